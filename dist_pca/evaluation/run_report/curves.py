"""Sections of curves over steps: losses, optimisation, cycles, self-training, validation and speed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dist_pca.evaluation.run_report.charts import COLORS, DASHES, Line, chart, describe, has_matplotlib
from dist_pca.evaluation.run_report.page import Block, Cell, Chart, Charts, LegendEntry, Section, Table
from dist_pca.evaluation.run_report.record import RunRecord, is_number

LEVELS = ("features", "predictions")


class Curve(NamedTuple):
    """A chart of one metric, or of a metric for each of several names."""

    title: str
    metrics: Mapping[str, str]
    """Metric by name of the line; the name is empty where there is one line."""
    unit: str = ""
    per_cent: bool = False
    from_zero: bool = False


def _one(title: str, metric: str, unit: str = "", *, per_cent: bool = False, from_zero: bool = False) -> Curve:
    return Curve(title, {"": metric}, unit, per_cent, from_zero)


def _levels(title: str, metric: str, unit: str = "", *, per_cent: bool = False) -> Curve:
    return Curve(title, {level: f"{metric}_{level}" for level in LEVELS}, unit, per_cent)


LOSSES = (
    _one("Loss", "loss", "what is minimised"),
    _one("Cross-entropy, source", "ce", "nats"),
    _one("Lovasz-Softmax, source", "lovasz"),
    _levels("Association", "association", "nats"),
    _one("Self-training", "self_training", "nats"),
    _one("Masked consistency", "masked_consistency", "nats"),
    _one("Source contrast", "source_contrast", "nats"),
    _one("Class statistics", "class_statistics", "nats"),
    _one("Feature distance", "feature_distance"),
    Curve("Label smoothness", {domain: f"smoothness_{domain}" for domain in ("source", "target")}),
)
OPTIMISATION = (
    _one("Learning rate, backbone", "learning_rate", from_zero=True),
    _one("Gradient norm", "gradient_norm", "before clipping", from_zero=True),
    _one("Loss scale", "loss_scale", "of fp16"),
    _one("Steps skipped", "skipped_share", per_cent=True),
)
CYCLES = (
    _levels("Consistent cycles", "consistent_ratio", "of labelled source pixels", per_cent=True),
    _levels("Cycles kept", "kept", "per micro-batch, over all ranks"),
    _levels("Target pixels covered", "cover_ratio", "by some match", per_cent=True),
    _levels("Correct matches", "correct_ratio", "by the target's labels", per_cent=True),
    _levels("Correct matches of kept cycles", "kept_correct_ratio", "by the target's labels", per_cent=True),
    _levels("Mutual information", "mutual_information_bound", "InfoNCE's lower bound, nats"),
)
SELF_TRAINING = (
    _one("Confident pseudo labels", "confident_share", "of target pixels", per_cent=True),
    _one("Correct pseudo labels", "pseudo_label_accuracy", "by the target's labels", per_cent=True),
)
SPEED = (
    _one("Seconds per step", "seconds_per_step", from_zero=True),
    _one("Images per second", "images_per_second", "both domains, all ranks", from_zero=True),
    _one("Waiting for data", "data_wait_share", "of the time", per_cent=True, from_zero=True),
    _one("Peak memory", "peak_memory_bytes", "bytes, highest rank", from_zero=True),
)


def curve_sections(records: Sequence[RunRecord], names: Sequence[str]) -> list[Section]:
    """Sections of curves, without charts of metrics that no run has.

    Args:
        records: The runs.
        names: A unique name for each.
    """
    classes = list(dict.fromkeys(info.name for record in records for info in record.classes))
    validation = [_one("Mean IoU", "validation_mean_iou", per_cent=True, from_zero=True)]
    validation += [_one(name, f"validation_iou/{name}", "IoU", per_cent=True, from_zero=True) for name in classes]
    association: list[Block] = [*_charts(records, names, CYCLES), *_kept_per_class(records, names, classes)]
    if len(records) == 1:
        association += _confusions(records[0], classes)
    return [
        Section("Losses", _charts(records, names, LOSSES), "Means over the steps since the point before, over ranks."),
        Section("Optimisation", _charts(records, names, OPTIMISATION), _rates(records)),
        Section(
            "Association",
            association,
            "A source pixel's match is the most similar target pixel; the cycle is consistent if that one's match is a "
            "source pixel of the first one's class. Only consistent cycles that the teacher confirms, where one is "
            "asked, are kept.",
        ),
        Section(
            "Pseudo labels",
            _charts(records, names, SELF_TRAINING),
            "A pseudo label is confident if its probability reaches objective.self_training.threshold.",
        ),
        Section(
            "Validation",
            _charts(records, names, validation),
            "Scores on data.validation during training.",
        ),
    ]


def speed_charts(records: Sequence[RunRecord], names: Sequence[str]) -> list[Charts]:
    """Charts of speed and memory."""
    return _charts(records, names, SPEED)


def _charts(records: Sequence[RunRecord], names: Sequence[str], curves: Sequence[Curve]) -> list[Charts]:
    if not has_matplotlib():
        return []
    several = len(records) > 1
    drawn, shown, inner_names = [], set[int](), dict[str, int]()
    for curve in curves:
        lines = []
        for place, (record, name) in enumerate(zip(records, names, strict=True)):
            for number, (inner, metric) in enumerate(curve.metrics.items()):
                steps, values = record.series(metric)
                if not steps or _says_nothing(metric, values):
                    continue
                color, dash = (place, number + 2 * (place // COLORS)) if several else (number, number)
                title = ", ".join(filter(None, (name if several else "", inner))) or curve.title
                lines.append(Line(title, steps, values, color % COLORS, dash % len(DASHES)))
                shown.add(place)
                if inner:
                    inner_names[inner] = number
        if lines:
            name = next(iter(curve.metrics.values()))
            svg = chart(lines, name=name, per_cent=curve.per_cent, from_zero=curve.from_zero)
            drawn.append(Chart(curve.title, curve.unit, svg, describe(lines, per_cent=curve.per_cent)))
    if not drawn:
        return []
    runs = [
        LegendEntry(name, place % COLORS, DASHES[2 * (place // COLORS) % len(DASHES)])
        for place, name in enumerate(names)
        if place in shown
    ]
    inner_legend = [
        LegendEntry(inner, 4 if several else number, DASHES[number]) for inner, number in inner_names.items()
    ]
    return [Charts(drawn, [*(runs if several else []), *inner_legend])]


def _says_nothing(metric: str, values: Sequence[float]) -> bool:
    """Whether a metric has kept the value that it has where it does not apply."""
    return (metric == "loss_scale" and set(values) == {1.0}) or (metric == "skipped_share" and not any(values))


def _rates(records: Sequence[RunRecord]) -> str:
    factors = {record.config.optimizer.head_multiplier for record in records if record.config is not None}
    if len(factors) != 1 or factors == {1.0}:
        return ""
    return f"The head and the projection have {factors.pop():g} times the backbone's learning rate."


def _kept_per_class(records: Sequence[RunRecord], names: Sequence[str], classes: Sequence[str]) -> list[Table]:
    columns = []
    for record, name in zip(records, names, strict=True):
        for level in LEVELS:
            kept = record.last(f"kept_per_class_{level}")
            if isinstance(kept, dict):
                columns.append((f"{name}, {level}" if len(records) > 1 else level, kept))
    if not columns:
        return []
    rows: list[list[Cell | str]] = []
    for of_class in classes:
        values = [kept.get(of_class) for _, kept in columns]
        cells = [
            Cell(f"{value:,.1f}", value / (_sum(kept) or 1)) if is_number(value) else Cell("-")
            for value, (_, kept) in zip(values, columns, strict=True)
        ]
        rows.append([of_class, *cells])
    caption = "Cycles kept by class of their source pixel, per micro-batch, over all ranks, in the last line of metrics"
    return [Table(caption, ["class", *(title for title, _ in columns)], rows, "bars")]


def _sum(values: Mapping[str, float]) -> float:
    return sum(value for value in values.values() if is_number(value))


def _confusions(record: RunRecord, classes: Sequence[str]) -> list[Table]:
    """Matches by class of the source pixel and true class of the target pixel, where that was known."""
    tables = []
    for level in LEVELS:
        counts = record.last(f"kept_confusion_{level}")
        if not isinstance(counts, dict) or not counts:
            continue
        rows: list[list[Cell | str]] = []
        for row in classes:
            values = [counts.get(f"{row} → {column}", 0.0) for column in classes]
            total = sum(values)
            rows.append([row, *(heat_cell(value, total) for value in values)])
        caption = f"Kept cycles, {level}: source class in rows, true class of the matched pixel in columns, % of a row"
        tables.append(Table(caption, ["", *classes], rows, "heat"))
    return tables


def heat_cell(value: float, total: float) -> Cell:
    """A cell of a matrix whose rows are shown in per cent; empty where the row is."""
    if not total:
        return Cell("")
    share = value / total
    return Cell("" if share == 0 else "<1" if share < 0.005 else f"{100 * share:.0f}", share)
