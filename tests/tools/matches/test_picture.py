"""Lines of a picture lead from source pixels to their matches, green where right and red where wrong."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from dist_pca.config import AssociationConfig
from dist_pca.evaluation.cycles import JudgedCycles, judge
from dist_pca.tools.matches.picture import CORRECT, WRONG, matches_picture
from tests.tools.matches.scenes import CAR, CLASSES, LOOKS, SOURCE, TRUTH, scene


def cycles(truth: list[list[int]]) -> JudgedCycles:
    return judge(AssociationConfig(diffusion=0), "features", scene(SOURCE, SOURCE), scene(LOOKS, truth))[0]


def picture(of: JudgedCycles, **keys: Any) -> Image.Image:
    grey = torch.full((1, 3, 40, 60), 128, dtype=torch.uint8)
    return matches_picture(grey, grey, of, CLASSES, **(dict[str, Any](title="tiny", seed=1) | keys))


def pixels(image: Image.Image, color: tuple[int, int, int]) -> int:
    """Pixels near a colour between the two crops, where lines alone are."""
    middle = np.asarray(image.crop((580, 62, 680, image.height - 40))).astype(int)
    return int((abs(middle - np.array(color)).max(axis=2) < 40).sum())


def test_right_matches_are_green_and_wrong_ones_red() -> None:
    # Matches of one row of pixels lie on one line: three rows are right, and one is wrong.
    found = cycles([*SOURCE[:2], [CAR] * 4, SOURCE[3]])
    assert int(found.correct.sum()) == 12
    drawn = picture(found)
    assert pixels(drawn, CORRECT) > 2 * pixels(drawn, WRONG) > 0


def test_without_a_wrong_match_nothing_is_red() -> None:
    drawn = picture(cycles([[*row] for row in SOURCE]))
    assert pixels(drawn, CORRECT) > 0
    assert pixels(drawn, WRONG) == 0


def test_cycles_that_are_not_consistent_are_dashed() -> None:
    found = cycles([[*row] for row in SOURCE])
    kept = found._replace(consistent=torch.ones_like(found.consistent), kept=torch.ones_like(found.kept))
    none = found._replace(consistent=torch.zeros_like(found.consistent), kept=torch.zeros_like(found.kept))
    assert pixels(picture(kept), CORRECT) > 2 * pixels(picture(none), CORRECT)


def test_the_sample_depends_on_the_seed_alone() -> None:
    large = cycles(TRUTH)
    labels, targets = large.labels.repeat(9), large.targets.repeat(9)
    many = large._replace(
        labels=labels,
        targets=targets,
        kept=large.kept.repeat(9),
        consistent=large.consistent.repeat(9),
        source_grid=(12, 12),
    )
    assert picture(many).tobytes() == picture(many).tobytes()
    assert picture(many).tobytes() != picture(many, seed=2).tobytes()
