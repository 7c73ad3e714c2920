"""Sections of scores: IoU of each class, and confusion matrices."""

import math
from collections.abc import Sequence

from dist_pca.data.addresses import redact
from dist_pca.evaluation.run_report.curves import heat_cell
from dist_pca.evaluation.run_report.page import Block, Cell, Color, Section, Table
from dist_pca.evaluation.run_report.record import RunRecord, ScoreRecord


def shown_scores(record: RunRecord) -> dict[str, ScoreRecord]:
    """Scores of the newest checkpoint that has any, by location of the shards."""
    newest: dict[str, ScoreRecord] = {}
    for score in record.scores:
        if score.shards not in newest or (score.step or 0) >= (newest[score.shards].step or 0):
            newest[score.shards] = score
    return newest


def score_sections(records: Sequence[RunRecord], names: Sequence[str], baseline: int | None) -> list[Section]:
    """Tables of scores and confusion matrices, one of each for every set of shards that a run was scored on.

    Args:
        records: The runs.
        names: A unique name for each.
        baseline: Index of the run that the others are compared with; None compares with none.
    """
    scores = [shown_scores(record) for record in records]
    places = list(dict.fromkeys(shards for each in scores for shards in each))
    colors = {info.name: info.color for record in records for info in record.classes}
    tables: list[Block] = []
    matrices: list[Block] = []
    for shards in places:
        found = [each.get(shards) for each in scores]
        tables.append(_class_table(shards, found, names, baseline, colors))
        matrices += [
            _confusion_table(name, score)
            for name, score in zip(names, found, strict=True)
            if score is not None and score.confusion is not None
        ]
    return [
        Section("Classes", tables, "Intersection over union of each class, in per cent."),
        Section("Confusion matrix", matrices, "Each row adds up to 100 % of the pixels of a true class."),
    ]


def _class_table(
    shards: str,
    scores: Sequence[ScoreRecord | None],
    names: Sequence[str],
    baseline: int | None,
    colors: dict[str, Color],
) -> Table:
    others = [place for place in range(len(names)) if place != baseline] if baseline is not None else []
    by_class = [dict(zip(score.classes, score.iou, strict=True)) if score else {} for score in scores]
    summaries = [
        {"mean IoU": score.mean_iou, "pixel accuracy": score.pixel_accuracy} if score else {} for score in scores
    ]
    rows: list[list[Cell | str]] = []
    for values, strong in ((by_class, False), (summaries, True)):
        for name in dict.fromkeys(name for each in values for name in each):
            numbers = [each.get(name, math.nan) for each in values]
            cells = [
                Cell("-") if math.isnan(number) else Cell(f"{100 * number:.1f}", number, strong=strong)
                for number in numbers
            ]
            differences = [numbers[place] - numbers[baseline] for place in others if baseline is not None]
            cells += [Cell("-" if math.isnan(value) else f"{100 * value:+.1f}") for value in differences]
            rows.append([Cell(name, swatch=colors.get(name), strong=strong), *cells])
    images = next(score.images for score in scores if score)
    titles = ["difference"] if len(others) == 1 else [f"{names[place]}, difference" for place in others]
    place = redact(shards) or "the shards that scores.json was made on"
    return Table(f"{images:,} images of {place}", ["", *names, *titles], rows, "bars")


def _confusion_table(name: str, score: ScoreRecord) -> Table:
    assert score.confusion is not None
    rows: list[list[Cell | str]] = [
        [of_class, *(heat_cell(value, sum(row)) for value in row)]
        for of_class, row in zip(score.classes, score.confusion, strict=True)
    ]
    caption = f"{name}: true class in rows, predicted class in columns, % of a row"
    return Table(caption, ["", *score.classes], rows, "heat")
