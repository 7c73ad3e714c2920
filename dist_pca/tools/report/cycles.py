"""Cycles of a batch as blocks of a report: a drawing, and the same in words."""

from collections.abc import Sequence

import numpy as np

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.data.collate import Batch
from dist_pca.evaluation.cycle_picture import BROKEN, CLOSED, count_outcomes, draw_cycles, image_names, sample_cycles
from dist_pca.evaluation.cycles import JudgedCycles
from dist_pca.evaluation.run_report.page import Block, Cell, Gallery, LegendEntry, Table
from dist_pca.shards.bands import shown
from dist_pca.tools.report.embedded import photo


def cycle_blocks(
    title: str,
    batch: tuple[Batch, Batch],
    candidate_sets: Sequence[JudgedCycles],
    classes: Sequence[ClassInfo],
    ranks: int,
) -> list[Block]:
    """Show a sample of a batch's cycles as a drawing, and in words as a table.

    Args:
        title: What the cycles are of.
        batch: Crops of source and target.
        candidate_sets: The batch's cycles: one candidate set of all images, or one for each pair of images.
        classes: The run's.
        ranks: Ranks that the images are divided among, in order.
    """
    drawn = sample_cycles(candidate_sets, seed=0)
    grids = candidate_sets[0].source_grid, candidate_sets[0].target_grid
    images = [shown(domain.images.permute(0, 2, 3, 1).cpu().numpy()) for domain in batch]
    sizes = [int(np.prod(grid)) for grid in grids]
    names = [image_names(len(own), ranks) for own in images]
    picture = draw_cycles(images, grids, drawn, classes, names)
    counts = count_outcomes(candidate_sets)
    total = sum(counts.values())
    parts = [f"{count:,} {outcome} ({100 * count / max(1, total):.0f} %)" for outcome, count in counts.items()]
    caption = f"{len(drawn)} of {total:,} cycles of labelled source pixels are drawn. Of all: {', '.join(parts)}."
    known = any(cycle.truth != IGNORE_INDEX for cycle in drawn)
    rows: list[list[Cell | str]] = []
    for number, cycle in enumerate(drawn, 1):
        start, match, end = (
            names[side][pixel // sizes[side]] + ("" if side and not known else f", {_class_name(classes, label)}")
            for label, pixel, side in (
                (cycle.label, cycle.source, 0),
                (cycle.truth, cycle.target, 1),
                (cycle.end_label, cycle.end, 0),
            )
        )
        rows.append([str(number), start, match, end, cycle.outcome])
    headings = ["", "source pixel", "its match" + (" and true class" if known else ""), "matched back", "outcome"]
    alt = f"Crops of both domains with {len(drawn)} cycles drawn as lines; the table below lists them"
    legend = [
        LegendEntry("consistent: it ends in its own class", CLOSED),
        LegendEntry("consistent, but refused by the teacher: dashed, with a cross at the match", CLOSED),
        LegendEntry("not consistent", BROKEN),
        *(LegendEntry(classes[label].name, classes[label].color) for label in sorted({each.label for each in drawn})),
    ]
    return [
        Gallery(title, [photo(np.asarray(picture), alt=alt, caption=caption, width=picture.width)], legend, wide=True),
        Table(f"{title}: the drawn ones in words", headings, rows, folded=True),
    ]


def _class_name(classes: Sequence[ClassInfo], label: int) -> str:
    return "no label" if label == IGNORE_INDEX else classes[label].name
