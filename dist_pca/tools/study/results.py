"""What a study has found so far: its runs as they are, and its variants summed up over seeds."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dist_pca.config.aliases import rename_metrics
from dist_pca.data.addresses import redact
from dist_pca.evaluation.report import Scores
from dist_pca.files import read_lines, write_whole
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.shards.manifest import Manifest
from dist_pca.tools.cluster.status import saved_step
from dist_pca.tools.study.design import PlannedRun, Study
from dist_pca.tools.study.paired import Difference, paired_difference
from dist_pca.tools.study.scoring import cached_scores
from dist_pca.training.checkpoint import latest_checkpoint, read_state


@dataclass(frozen=True)
class RunResult:
    """One run as its folder shows it."""

    variant: str
    seed: int
    folder: Path
    step: int
    """Step of the newest checkpoint; 0 without one."""
    scores: dict[str, Scores]
    """By location of the test shards; only a finished run has any."""
    message: str
    """Why it has no scores; empty where it has them all."""
    seconds_per_step: float | None
    """Median over the lines of metrics.jsonl."""
    peak_memory_bytes: int | None
    """Highest on any rank."""
    code: str
    """Version of the code that wrote the newest checkpoint."""


class Summary(NamedTuple):
    """One variant over its seeds, on one set of test shards. Scores are in 0..1."""

    variant: str
    shards: str
    seeds: int
    """Seeds that have scores."""
    mean_iou: float
    lowest: float
    """Lowest mean IoU of a seed."""
    highest: float
    """Highest mean IoU of a seed."""
    difference: Difference | None
    """In mean IoU from the baseline; None for the baseline itself, and where no seed is shared with it."""
    pixel_accuracy: float
    label_sets: dict[str, float]
    """Mean IoU of each named label set."""
    classes: dict[str, float]
    """Mean over seeds of each class's IoU; nan where no seed has one."""
    class_differences: dict[str, Difference | None]
    """In IoU from the baseline, by class."""
    seconds_per_step: float | None
    """Median over runs."""
    peak_memory_bytes: int | None
    """Highest of the runs."""


def collect(study: Study, manifests: Mapping[str, Manifest]) -> list[RunResult]:
    """Read what the runs' folders hold; nothing is trained or scored.

    Args:
        study: The study.
        manifests: Its test shards, by location.

    Raises:
        UserError: a run's config or newest checkpoint cannot be read.
    """
    return [_read(run, study.resolve(run).training.steps, manifests) for run in study.runs]


def summarise(study: Study, results: Sequence[RunResult]) -> list[Summary]:
    """Sum up each variant that has scores, for each set of test shards, in the study's order."""
    summaries = []
    for shards in study.tests:
        scored = [result for result in results if shards in result.scores]
        baseline = {result.seed: result.scores[shards] for result in scored if result.variant == study.baseline}
        for variant in study.variants:
            own = [result for result in scored if result.variant == variant.name]
            if own:
                is_baseline = variant.name == study.baseline
                summaries.append(_summary(own, shards, None if is_baseline else baseline))
    return summaries


def write_results(study: Study, results: Sequence[RunResult], summaries: Sequence[Summary]) -> None:
    """Write study.csv, one row for each run and set of test shards, and summary.csv, one for each variant and set.

    Scores are in 0..1, empty where there is nothing to score.
    """
    write_whole(study.out / "study.csv", _csv([_run_row(r, shards) for r in results for shards in r.scores]))
    write_whole(study.out / "summary.csv", _csv([_summary_row(summary) for summary in summaries]))


def to_json(study: Study, results: Sequence[RunResult], summaries: Sequence[Summary]) -> str:
    """The design, all runs and all summaries as one JSON object, with null for what is not there."""
    runs: list[dict[str, Any]] = []
    for result in results:
        values = dict(vars(result)) | {"folder": str(result.folder)}
        runs.append(values | {"scores": {key: json.loads(scores.to_json()) for key, scores in result.scores.items()}})
    return json.dumps(
        {
            "config": study.config,
            "out": str(study.out),
            "baseline": study.baseline,
            "seeds": study.seeds,
            "set": study.settings,
            "variants": {variant.name: variant.overrides for variant in study.variants},
            "runs": runs,
            "summaries": [_without_nan(summary) for summary in summaries],
        },
        indent=2,
    )


def _read(run: PlannedRun, steps: int, manifests: Mapping[str, Manifest]) -> RunResult:
    step, scores, code = saved_step(run.folder), dict[str, Scores](), ""
    if (checkpoint := latest_checkpoint(run.folder / "checkpoints")) is not None:
        code = str(read_state(checkpoint).get("code", ""))
    if checkpoint is not None and step >= steps:
        found = {shards: cached_scores(run.folder, manifest, checkpoint) for shards, manifest in manifests.items()}
        scores = {shards: each for shards, each in found.items() if each is not None}
        message = "" if len(scores) == len(manifests) else "not scored yet"
    else:
        outcome = read_exit_status(run.folder)
        started = (run.folder / "config.yaml").is_file()
        message = f"step {step:,} of {steps:,}" if started else "not started"
        if outcome is not None and outcome.code not in (ExitCode.DONE, ExitCode.SAVED, ExitCode.INTERRUPTED):
            message = outcome.message
    lines = _metrics(run.folder / "metrics.jsonl")
    seconds = [line["seconds_per_step"] for line in lines if isinstance(line.get("seconds_per_step"), float)]
    peaks = [line["peak_memory_bytes"] for line in lines if isinstance(line.get("peak_memory_bytes"), int)]
    return RunResult(
        variant=run.variant,
        seed=run.seed,
        folder=run.folder,
        step=step,
        scores=scores,
        message=message,
        seconds_per_step=statistics.median(seconds) if seconds else None,
        peak_memory_bytes=max(peaks, default=None),
        code=code,
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return [rename_metrics(values) for _, values in read_lines(path)]
    return []


def _summary(results: Sequence[RunResult], shards: str, baseline: Mapping[int, Scores] | None) -> Summary:
    """Sum up one variant; the baseline's scores by seed are None for the baseline itself."""
    scores = {result.seed: result.scores[shards] for result in results}

    def difference(value: Callable[[Scores], float]) -> Difference | None:
        ours, theirs = ({seed: value(each) for seed, each in part.items()} for part in (scores, baseline or {}))
        return paired_difference(ours, theirs)

    first = next(iter(scores.values()))
    mean_ious = [each.mean_iou for each in scores.values()]
    seconds = [result.seconds_per_step for result in results if result.seconds_per_step is not None]
    peaks = [result.peak_memory_bytes for result in results if result.peak_memory_bytes is not None]
    return Summary(
        variant=results[0].variant,
        shards=shards,
        seeds=len(scores),
        mean_iou=_mean(mean_ious),
        lowest=min(mean_ious),
        highest=max(mean_ious),
        difference=difference(lambda each: each.mean_iou),
        pixel_accuracy=_mean([each.pixel_accuracy for each in scores.values()]),
        label_sets={name: _mean([each.label_sets[name] for each in scores.values()]) for name in first.label_sets},
        classes={name: _mean([class_iou(each, name) for each in scores.values()]) for name in first.classes},
        class_differences={name: difference(partial(class_iou, name=name)) for name in first.classes},
        seconds_per_step=statistics.median(seconds) if seconds else None,
        peak_memory_bytes=max(peaks, default=None),
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def class_iou(scores: Scores, name: str) -> float:
    """IoU of a class by name; nan where the run has no such class."""
    return dict(zip(scores.classes, scores.iou, strict=True)).get(name, math.nan)


def _run_row(result: RunResult, shards: str) -> dict[str, Any]:
    scores = result.scores[shards]
    return {
        "variant": result.variant,
        "seed": result.seed,
        "shards": redact(shards),
        "run": str(result.folder),
        "step": result.step,
        "images": scores.images,
        "mean_iou": scores.mean_iou,
        "pixel_accuracy": scores.pixel_accuracy,
        **{f"mean_iou_{name}": value for name, value in scores.label_sets.items()},
        **{f"iou_{name}": value for name, value in zip(scores.classes, scores.iou, strict=True)},
        "seconds_per_step": result.seconds_per_step,
        "peak_memory_bytes": result.peak_memory_bytes,
        "code": result.code,
    }


def _summary_row(summary: Summary) -> dict[str, Any]:
    difference = summary.difference._asdict() if summary.difference else dict.fromkeys(Difference._fields)
    differences = summary.class_differences
    return {
        "variant": summary.variant,
        "shards": redact(summary.shards),
        "seeds": summary.seeds,
        "mean_iou": summary.mean_iou,
        "lowest": summary.lowest,
        "highest": summary.highest,
        **{f"difference_{name}": value for name, value in difference.items()},
        "pixel_accuracy": summary.pixel_accuracy,
        **{f"mean_iou_{name}": value for name, value in summary.label_sets.items()},
        **{f"iou_{name}": value for name, value in summary.classes.items()},
        **{f"iou_difference_{name}": each and each.mean for name, each in differences.items()},
        **{f"iou_difference_standard_error_{name}": each and each.standard_error for name, each in differences.items()},
        "seconds_per_step": summary.seconds_per_step,
        "peak_memory_bytes": summary.peak_memory_bytes,
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if _without_nan(value) is None else value for key, value in row.items()})
    return text.getvalue()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {key: _without_nan(part) for key, part in value.items()} if isinstance(value, dict) else value
