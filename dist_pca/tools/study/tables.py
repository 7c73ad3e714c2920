"""Tables of a study, for the terminal and as Markdown. Scores are in per cent, differences in points."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from dist_pca.data.addresses import redact
from dist_pca.files import write_whole
from dist_pca.tools.bench.report import markdown_table, rich_table
from dist_pca.tools.study.design import Study
from dist_pca.tools.study.paired import CONFIDENCE, Difference
from dist_pca.tools.study.results import RunResult, Summary

_GIB = 2**30
Rows = list[dict[str, str]]


def tables(study: Study, summaries: Sequence[Summary]) -> list[tuple[str, Rows]]:
    """Title and rows of each table: for each set of test shards the variants, and classes by variant and difference."""
    found = []
    for shards in study.tests:
        own = [summary for summary in summaries if summary.shards == shards]
        place = f"{study.out.name} on {redact(shards)}"
        if own:
            found.append((place, [_variant_row(summary, study.baseline) for summary in own]))
            found.append((f"{place}: IoU of each class, mean over seeds", _class_rows(own)))
        if len(own) > 1:
            found.append((f"{place}: difference in IoU from {study.baseline}", _class_difference_rows(own)))
    return found


def notes(study: Study, results: Sequence[RunResult]) -> list[str]:
    """What a reader of the tables has to know, and what is missing in them."""
    lines = [
        f"Differences are from {study.baseline}, paired by seed: their mean, its standard error, and Student's "
        f"{CONFIDENCE:.0%} interval for the mean. n is the number of pairs; with one there is no interval. Scores are "
        "in per cent, differences in points."
    ]
    codes = {result.code for result in results if result.code}
    if len(codes) > 1:
        lines.append(f"Runs were made by different code: {', '.join(sorted(codes))}.")
    missing = [f"{result.folder.name}: {result.message}" for result in results if result.message]
    return [*lines, *(f"Without scores: {line}" for line in missing)]


def rich_tables(study: Study, summaries: Sequence[Summary]) -> list[Table]:
    """The tables, for the terminal."""
    return [rich_table(title, rows) for title, rows in tables(study, summaries)]


def write_markdown(study: Study, results: Sequence[RunResult], summaries: Sequence[Summary]) -> None:
    """Write summary.md."""
    parts = [f"# {study.out.name}", f"Config `{study.config}`, seeds {', '.join(map(str, study.seeds))}."]
    for title, rows in tables(study, summaries):
        parts += [f"## {title}", markdown_table(rows)]
    parts += notes(study, results)
    write_whole(Path(study.out) / "summary.md", "\n\n".join(parts) + "\n")


def _variant_row(summary: Summary, baseline: str) -> dict[str, str]:
    seconds, peak, difference = summary.seconds_per_step, summary.peak_memory_bytes, summary.difference
    interval = ""
    if difference is not None and difference.low is not None and difference.high is not None:
        interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return {
        "variant": summary.variant,
        "seeds": str(summary.seeds),
        "mIoU": _percent(summary.mean_iou),
        "range": f"{_percent(summary.lowest)}-{_percent(summary.highest)}",
        "difference": "baseline" if summary.variant == baseline else _points(difference),
        f"{CONFIDENCE:.0%} interval": interval,
        "n": str(difference.pairs) if difference else "",
        **{f"mIoU {name}": _percent(value) for name, value in summary.label_sets.items()},
        "accuracy": _percent(summary.pixel_accuracy),
        "s/step": "" if seconds is None else f"{seconds:.3g}",
        "GiB": "" if peak is None else f"{peak / _GIB:.2f}",
    }


def _class_rows(summaries: Sequence[Summary]) -> Rows:
    names = dict.fromkeys(name for summary in summaries for name in summary.classes)
    return [
        {"class": name, **{each.variant: _percent(each.classes.get(name, math.nan)) for each in summaries}}
        for name in names
    ]


def _class_difference_rows(summaries: Sequence[Summary]) -> Rows:
    names = dict.fromkeys(name for summary in summaries for name in summary.class_differences)
    compared = [summary for summary in summaries if any(summary.class_differences.values())]
    return [
        {"class": name, **{each.variant: _points(each.class_differences.get(name)) or "-" for each in compared}}
        for name in names
    ]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _points(difference: Difference | None) -> str:
    """Mean difference, with its standard error where there is one."""
    if difference is None:
        return ""
    error = "" if difference.standard_error is None else f" ± {100 * difference.standard_error:.1f}"
    return f"{100 * difference.mean:+.1f}{error}"
