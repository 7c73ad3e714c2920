"""Networks side by side: their scores as a table, and their predictions as a picture."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.table import Table
from rich.text import Text

from dist_pca.classes import ClassInfo
from dist_pca.evaluation.pictures import color_labels, grid_picture
from dist_pca.evaluation.report import Scores, per_cent

Pixels = npt.NDArray[np.uint8]
Row = tuple[Pixels, Pixels | None, Sequence[Pixels]]
"""An RGB image (height x width x 3), its true train ids (height x width) if known, and predicted train ids."""


def comparison_picture(rows: Sequence[Row], classes: Sequence[ClassInfo], titles: Sequence[str]) -> Image.Image:
    """Draw one image per row (input, true labels if there are any, predictions), and a legend of the classes.

    Args:
        rows: Images of any sizes, each with as many predictions as there are titles.
        classes: Classes by train id.
        titles: Titles of the predictions, for example before and after adaptation.
    """
    with_truth = any(truth is not None for _, truth, _ in rows)
    headings = ["input", *(["truth"] if with_truth else []), *titles]
    cells: list[list[Pixels | None]] = []
    for image, truth, predictions in rows:
        labels = [*([truth] if with_truth else []), *predictions]
        cells.append([image, *(None if label is None else color_labels(label, classes) for label in labels)])
    return grid_picture(cells, headings, classes)


def compare_table(runs: Sequence[tuple[str, Scores]], differences: Sequence[tuple[str, int, int]]) -> Table:
    """Tabulate networks' scores side by side in per cent, the best of each row in bold.

    A dash means that there is nothing to score.

    Args:
        runs: Title and scores of each network.
        differences: Columns of differences in percentage points: title, index of the network that is subtracted, and of
            the one that it is subtracted from. None compares two networks, and no more than two.
    """
    result = Table("class")
    for title in (*(title for title, _ in runs), *(title for title, _, _ in differences)):
        # Otherwise rich cuts words of a short heading on a narrow terminal before it breaks a long one into lines.
        result.add_column(title, justify="right", min_width=min(12, max(map(len, title.split()), default=0)))
    by_class = [dict(zip(scores.classes, scores.iou, strict=True)) for _, scores in runs]
    summaries = [_summary(scores) for _, scores in runs]
    for part in (by_class, summaries):
        for name in dict.fromkeys(name for values in part for name in values):
            result.add_row(name, *_cells([values.get(name, math.nan) for values in part], differences))
        result.add_section()
    result.add_row("images", *(str(scores.images) for _, scores in runs))
    return result


def _summary(scores: Scores) -> dict[str, float]:
    sets = {f"mIoU {name}": value for name, value in scores.label_sets.items()}
    return {"mIoU": scores.mean_iou, **sets, "pixel accuracy": scores.pixel_accuracy}


def _cells(values: Sequence[float], differences: Sequence[tuple[str, int, int]]) -> list[Text]:
    known = [value for value in values if not math.isnan(value)]
    differ = len(set(known)) > 1
    cells = []
    for value in values:
        cells.append(Text(per_cent(value), "bold" if differ and value == max(known) else ""))
    for _, before, after in differences:
        difference = values[after] - values[before]
        cells.append(Text("-" if math.isnan(difference) else f"{100 * difference:+.1f}"))
    return cells
