import json
import math
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.data.stream import evaluation_stream
from dist_pca.errors import UserError
from dist_pca.evaluation.evaluate import evaluate
from dist_pca.evaluation.load import load_run
from dist_pca.model.segmenter import Segmenter
from dist_pca.shards.build import build_shards
from dist_pca.shards.manifest import Manifest, load_manifest
from dist_pca.tools.study import selection
from dist_pca.tools.study.selection import (
    Measured,
    Measurement,
    choose,
    class_probabilities,
    find_candidates,
    guard,
    histogram_entropy,
    measure,
    predicted_classes,
    spread,
)
from tests.support.networks import segmenter, write_run
from tests.support.raw_data import make_band_folder
from tests.support.shards import CLASSES, make_shards


def shaken(amount: float, seed: int) -> Segmenter:
    """The network of `segmenter`, with noise on its weights."""
    network = segmenter()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that nearly agree, one that does not, one of two checkpoints, and target shards."""
    folder = tmp_path_factory.mktemp("selection")
    write_run(folder / "other", turned())
    write_run(folder / "near", shaken(0.02, 1))
    write_run(folder / "middle", segmenter())
    write_run(folder / "two", shaken(2.0, 9), segmenter())
    make_shards(folder / "target", [2, 3], labelled=False)
    make_shards(folder / "labelled", [2, 3])
    return folder


def runs(folder: Path, *names: str) -> list[Path]:
    return [folder / name / "tiny" for name in names]


def turned() -> Segmenter:
    """The network of `segmenter`, which takes each class for the next one."""
    network = segmenter()
    with torch.no_grad():
        for parameter in network.head.classifier.parameters():  # type: ignore[union-attr]
            parameter.copy_(parameter.roll(1, 0))
    return network


def manifest_of(folder: Path, name: str) -> Manifest:
    return load_manifest(folder / name)


def test_by_agreement_the_candidate_nearest_to_the_majority_is_chosen(folder: Path) -> None:
    candidates = find_candidates(runs(folder, "other", "near", "middle"), all_checkpoints=False)
    found = measure(candidates, manifest_of(folder, "target"), device="cpu")
    scores = [each.agreement for each in found.candidates]
    assert choose(found, guard(found, None), "agreement") in (1, 2)
    assert scores[0] < min(scores[1:])


def test_scores_are_those_of_whole_probability_maps_held_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = find_candidates(runs(folder, "other", "near", "middle"), all_checkpoints=False)
    target = manifest_of(folder, "target")
    found = measure(candidates, target, device="cpu")
    networks = [load_run(candidate.run) for candidate in candidates]
    samples = list(evaluation_stream(target, 0, 1, classes=CLASSES, workers=0))
    maps = [
        torch.cat([class_probabilities(model, sample.image, config, "cpu").flatten(1) for sample in samples], dim=1)
        for config, _, model in networks
    ]
    ensemble = torch.stack(maps).mean(dim=0).argmax(dim=0)
    assert int(found.ensemble.sum()) == len(ensemble)
    for each, pixels in zip(found.candidates, maps, strict=True):
        assert each.agreement == pytest.approx(float((pixels.argmax(0) == ensemble).double().mean()), abs=1e-3)
        # Mutual information as the mean divergence of a pixel's classes from those of all.
        divergence = (pixels * (pixels / pixels.mean(dim=1, keepdim=True)).log()).sum(dim=0).mean()
        assert each.information == pytest.approx(float(divergence), abs=1e-5)
    # Chunks of a single image give the same.
    monkeypatch.setattr(selection, "CHUNK_BYTES", 1)
    again = measure(candidates, target, device="cpu")
    assert [each[:2] for each in again.candidates] == [each[:2] for each in found.candidates]


def test_probabilities_are_those_that_evaluation_labels_by(folder: Path) -> None:
    write_run(folder / "views", segmenter(), flip=True, scales=(1.0, 1.5))
    for name in ("middle", "views"):
        config, _, model = load_run(folder / name / "tiny")
        image = next(iter(evaluation_stream(manifest_of(folder, "target"), 0, 1, classes=CLASSES, workers=0))).image
        probabilities = class_probabilities(model, image, config, "cpu")
        assert probabilities.shape == (3, 6, 10)
        assert torch.allclose(probabilities.sum(dim=0), torch.ones(6, 10))


def test_runs_of_other_bands_are_compared_on_shards_of_as_many_alone(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tifffile", reason="tifffile is in the extra `bands`")
    for name in ("one", "two"):
        write_run(tmp_path / name, segmenter(bands=4), model={"bands": 4})
    make_band_folder(tmp_path / "raw", 4, samples=2)
    four = build_shards(tmp_path / "raw/recipe.yaml", tmp_path / "raw", tmp_path / "four", workers=1)
    candidates = find_candidates(runs(tmp_path, "one", "two"), all_checkpoints=False)
    assert int(measure(candidates, four, device="cpu").ensemble.sum()) > 0
    with pytest.raises(UserError, match="images of 3 bands, and the network takes 4"):
        measure(candidates, manifest_of(folder, "target"), device="cpu")


def test_labels_of_the_target_never_choose(folder: Path, tmp_path: Path) -> None:
    candidates = find_candidates(runs(folder, "other", "near", "middle"), all_checkpoints=False)
    bare, labelled = (measure(candidates, manifest_of(folder, name), device="cpu") for name in ("target", "labelled"))
    # The same images under labels of which none can be read.
    shutil.copytree(folder / "labelled", tmp_path / "labelled")
    for shard in (tmp_path / "labelled").glob("*.tar"):
        content = shard.read_bytes()
        places = [place for place in range(0, len(content), 512) if b".label.png" in content[place : place + 100]]
        assert places
        for place in places:
            content = content[: place + 512] + b"\0" * 512 + content[place + 1024 :]
        shard.write_bytes(content)
    spoilt = measure(candidates, manifest_of(tmp_path, "labelled"), device="cpu")
    for found in (labelled, spoilt):
        assert [each[:2] for each in found.candidates] == [each[:2] for each in bare.candidates]
        assert all(
            torch.equal(ours.histogram, theirs.histogram)
            for ours, theirs in zip(found.candidates, bare.candidates, strict=True)
        )


def test_a_candidate_whose_outputs_are_not_finite_is_out_and_has_no_vote(folder: Path, tmp_path: Path) -> None:
    broken = segmenter()
    with torch.no_grad():
        next(broken.head.parameters()).fill_(torch.nan)
    write_run(tmp_path / "broken", broken)
    sound = runs(folder, "other", "near", "middle")
    alone, images = measure(find_candidates(sound, all_checkpoints=False), manifest_of(folder, "target"), device="cpu")
    four = find_candidates([*sound, tmp_path / "broken" / "tiny"], all_checkpoints=False)
    beside = measure(four, manifest_of(folder, "target"), device="cpu")
    assert guard(beside, None)[-1] == ["outputs are not finite"]
    assert torch.equal(beside.ensemble, images)
    for one, other in zip(alone, beside.candidates, strict=False):
        assert (one.information, one.agreement) == (other.information, other.agreement)


def measurement(*histograms: tuple[int, ...], scores: tuple[float, ...] | None = None) -> Measurement:
    counts = [torch.tensor(histogram) for histogram in histograms]
    given = scores or tuple(1.0 - 0.1 * place for place in range(len(counts)))
    measured = [Measured(score, 1 - score / 20, count) for score, count in zip(given, counts, strict=True)]
    return Measurement(measured, torch.stack(counts).sum(dim=0))


HEALTHY = (500, 300, 150, 50)


def test_a_candidate_that_forgot_the_source_is_kept_out_though_its_score_is_best() -> None:
    found = measurement(HEALTHY, HEALTHY, HEALTHY)
    reasons = guard(found, [0.50, 0.531, 0.511], tolerance=0.02)
    assert [bool(out) for out in reasons] == [True, False, False]
    assert "source mIoU 3.1 below the best" in reasons[0]
    assert choose(found, reasons) == 1
    assert choose(found, guard(found, [0.50, 0.531, 0.511], tolerance=0.04)) == 0
    assert choose(found, guard(found, None)) == 0


@pytest.mark.parametrize("collapsed", [(999, 1, 0, 0), (500, 500, 0, 0), (997, 1, 1, 1), (1000, 0, 0, 0)])
def test_a_candidate_that_has_collapsed_is_kept_out(collapsed: tuple[int, ...]) -> None:
    reasons = guard(measurement(collapsed, HEALTHY, HEALTHY), None)
    assert reasons[0]
    assert reasons[0][0].startswith("collapsed")
    assert reasons[1:] == [[], []]


def test_one_healthy_candidate_among_collapsed_ones_is_left() -> None:
    # The median has collapsed; the ensemble has not, quite.
    found = measurement((1000, 0, 0, 0), (1000, 0, 0, 0), HEALTHY)
    assert [bool(out) for out in guard(found, None)] == [True, True, False]


def test_a_common_class_that_is_lost_keeps_a_candidate_out_and_a_rare_one_does_not() -> None:
    common, rare = (500, 300, 190, 10), (500, 300, 191, 9)
    lost = (500, 300, 200, 0)
    assert guard(measurement(lost, common, common), None) == [["1 class lost"], [], []]
    assert guard(measurement(lost, rare, rare), None) == [[], [], []]
    assert guard(measurement(lost, lost, common), None) == [[], [], []]


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any), min_size=3, max_size=6))
def test_equal_histograms_are_kept_and_the_fullest_one_is_never_out(histograms: list[list[int]]) -> None:
    assert guard(measurement(*[tuple(histograms[0])] * 3), None) == [[], [], []]
    even = (250, 250, 250, 250)
    assert guard(measurement(even, *map(tuple, histograms)), None)[0] == []


def test_no_candidate_left_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UserError, match="--tolerance"):
        choose(measurement(HEALTHY, HEALTHY), [["a"], ["b"]])


def rated(*scores: tuple[float, float]) -> Measurement:
    """Candidates of given information and agreement, and equal histograms."""
    return Measurement([Measured(*score, torch.tensor(HEALTHY)) for score in scores], torch.tensor(HEALTHY))


def test_the_highest_score_of_the_rule_is_chosen_and_of_equal_ones_the_first() -> None:
    found = rated((0.5, 0.95), (0.7, 0.9), (0.7, 0.9))
    assert choose(found, [[], [], []]) == 1
    assert choose(found, [[], [], []], "agreement") == 0


def test_information_counts_as_much_as_a_majority_agrees() -> None:
    found = rated((0.49, 0.87), (0.46, 0.98), (0.43, 0.98))
    assert choose(found, [[], [], []]) == 1
    # Two differ from their average alike, whichever is right.
    assert choose(rated((0.49, 0.87), (0.46, 0.98)), [[], []]) == 0


def test_classes_count_from_a_thousandth_of_the_pixels() -> None:
    assert predicted_classes(torch.tensor([9989, 10, 1])) == 2
    assert histogram_entropy(torch.tensor([5, 5, 0])) == pytest.approx(math.log(2))


@settings(max_examples=10)
@given(st.integers(1, 8))
def test_samples_are_spread_over_the_shards_in_their_order(most: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        manifest = make_shards(Path(place) / "shards", [2, 0, 3])
        part = spread(manifest, most)
        keys = [key for shard in manifest.shards for key in shard.keys]
        kept = [key for shard in part.shards for key in shard.keys]
        assert part.samples == len(kept) == min(most, 5)
        assert kept == sorted(kept, key=keys.index)
        gaps = [keys.index(b) - keys.index(a) for a, b in pairwise(kept)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        # Their pixels are those that they had.
        ours = {s.key: s for s in evaluation_stream(part, 0, 1, classes=CLASSES, workers=0)}
        for sample in evaluation_stream(manifest, 0, 1, classes=CLASSES, workers=0):
            if sample.key in ours:
                assert np.array_equal(sample.image, ours[sample.key].image)
                assert np.array_equal(np.asarray(sample.label), np.asarray(ours[sample.key].label))


def test_a_part_of_the_shards_is_scored_as_a_whole_of_its_own(folder: Path) -> None:
    config, classes, model = load_run(folder / "middle" / "tiny")
    part = spread(manifest_of(folder, "labelled"), 2)
    assert evaluate(model, part, classes, config, device="cpu", quiet=True).images == 2


def test_runs_of_other_classes_are_refused_and_the_first_difference_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "near", tmp_path / "near")
    table = tmp_path / "near/tiny/classes.json"
    table.write_text(
        json.dumps([{**info, "name": info["name"].replace("sky", "sea")} for info in json.loads(table.read_text())])
    )
    with pytest.raises(UserError, match=r"first at train id 1: sea where .* has sky"):
        find_candidates([*runs(folder, "middle"), tmp_path / "near/tiny"], all_checkpoints=False)


def test_what_cannot_be_a_candidate_is_refused(folder: Path, tmp_path: Path) -> None:
    for wanted, message in (
        ([tmp_path], "not a run folder"),
        ([write_run(tmp_path)], "has no checkpoint yet"),
        (runs(folder, "near"), "--all-checkpoints"),
        (runs(folder, "near", "near"), "single candidate"),
    ):
        with pytest.raises(UserError, match=message):
            find_candidates(wanted, all_checkpoints=False)


def test_all_checkpoints_are_candidates_where_that_is_wanted(folder: Path) -> None:
    newest = find_candidates(runs(folder, "two", "near"), all_checkpoints=False)
    assert [candidate.step for candidate in newest] == [2, 1]
    assert [candidate.step for candidate in find_candidates(runs(folder, "two", "near"), all_checkpoints=True)] == [
        1,
        2,
        1,
    ]
