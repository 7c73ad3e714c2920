"""What a run folder holds, read so that a file that is missing or damaged costs no more than its own content."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import TypeAdapter

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig, load_config
from dist_pca.config.aliases import rename_metrics
from dist_pca.errors import UserError
from dist_pca.files import read_lines, read_record
from dist_pca.resilience.exit_status import ExitStatus, read_exit_status
from dist_pca.training.accumulation import fit_batches
from dist_pca.training.run_folder import Launch, read_classes, read_launch_log

Metrics = dict[str, Any]
_LARGEST = 1e100
"""Bound on numbers: sums and products of some of them are finite."""


@dataclass(frozen=True)
class ScoreRecord:
    """Scores of a checkpoint on labelled shards; nan where there is nothing to score."""

    shards: str
    """Where they are; empty where the file does not hold it."""
    step: int | None
    classes: tuple[str, ...]
    iou: tuple[float, ...]
    mean_iou: float
    pixel_accuracy: float
    images: int
    confusion: tuple[tuple[float, ...], ...] | None = None
    """Pixels by true class (row) and predicted class; None where they were not kept."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """Content of a run folder; what cannot be read is empty or None, and has a note."""

    folder: Path
    config: RunConfig | None
    classes: tuple[ClassInfo, ...]
    data: dict[str, Any]
    """`data.json`: shards by domain."""
    environment: dict[str, Any]
    launches: list[Launch]
    exit: ExitStatus | None
    metrics: list[Metrics]
    """Lines of `metrics.jsonl`, by step."""
    scores: list[ScoreRecord]
    notes: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.absolute().name

    @property
    def step(self) -> int:
        """Last step that is logged."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it has one; `outer/inner` is a value of a nested field."""
        steps, values = [], []
        for line in self.metrics:
            if is_number(value := _value(line, metric)):
                steps.append(int(line["step"]))
                values.append(float(value))
        return steps, values

    def last(self, metric: str) -> Any:
        """Last value of a metric that is not null; None where there is none."""
        return next((line[metric] for line in reversed(self.metrics) if line.get(metric) is not None), None)

    def mean_per_step(self, metric: str) -> float | None:
        """Mean over steps of a number that each line holds as a mean over its own steps; None where there is none."""
        total, weights, before = 0.0, 0, 0
        for line in self.metrics:
            steps, before = int(line["step"]) - before, int(line["step"])
            if is_number(value := _value(line, metric)):
                total, weights = total + steps * float(value), weights + steps
        return total / weights if weights else None

    @property
    def seconds(self) -> float | None:
        """Wall time of all logged steps, without what several launches spent on starting."""
        pace = self.mean_per_step("seconds_per_step")
        return None if pace is None else pace * self.step


def _value(line: Metrics, metric: str) -> Any:
    """Value of a metric in a line; `outer/inner` is a value of a nested field, None where that is not nested."""
    outer, _, inner = metric.partition("/")
    value = line.get(outer)
    if not inner:
        return value
    return value.get(inner) if isinstance(value, dict) else None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a JSON file is a number, and a finite one that can be computed with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def read_run_folder(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it holds neither `config.yaml` nor `metrics.jsonl`, so it is no run folder.
    """
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"{folder}: not a run folder (no config.yaml or metrics.jsonl); name the folder that training wrote"
        )
    notes: list[str] = []
    environment = _read_table(folder / "environment.json", notes)
    config = None
    classes: tuple[ClassInfo, ...] = ()
    try:
        ranks = environment.get("world_size")
        config = fit_batches(load_config(folder / "config.yaml"), ranks if isinstance(ranks, int) else 1)
    except (UserError, OSError, ValueError) as error:
        notes.append(f"{folder / 'config.yaml'}: cannot be read ({error}).")
    try:
        classes = read_classes(folder)
    except UserError as error:
        notes.append(f"{error}.")
    return RunRecord(
        folder=folder,
        config=config,
        classes=classes,
        data=_read_table(folder / "data.json", notes),
        environment=environment,
        launches=read_launch_log(folder),
        exit=read_exit_status(folder),
        metrics=_read_metrics(folder / "metrics.jsonl", notes),
        scores=_read_scores(folder / "scores.json", notes),
        notes=notes,
    )


def _read_table(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return read_record(file, TypeAdapter(dict[str, Any]), "restore it")
    except UserError as error:
        notes.append(f"{error}.")
        return {}


def _read_metrics(file: Path, notes: list[str]) -> list[Metrics]:
    lines: dict[int, Metrics] = {}
    try:
        for _, values in read_lines(file):
            if is_number(step := values.get("step")) and isinstance(step, int):
                lines[step] = rename_metrics(values)
    except OSError as error:
        notes.append(f"{file}: cannot be read ({error.strerror or error}).")
    if not lines:
        notes.append(f"{file}: holds no line of metrics, so there are no curves.")
    return [lines[step] for step in sorted(lines)]


def _read_scores(file: Path, notes: list[str]) -> list[ScoreRecord]:
    if not file.is_file():
        return []
    try:
        values = read_record(file, TypeAdapter(Any), "restore or remove it")
        entries = values if isinstance(values, list) else [{"scores": values}]
        return [score_record(entry["scores"], str(entry.get("shards", "")), entry.get("step")) for entry in entries]
    except UserError as error:
        notes.append(f"{error}.")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        notes.append(f"{file}: holds no scores that can be read ({type(error).__name__}: {error}).")
    return []


def score_record(values: dict[str, Any], shards: str, step: int | None) -> ScoreRecord:
    """Convert scores as `Scores.to_json` writes them, with `confusion` if they hold one.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: they are something else.
    """
    confusion = values.get("confusion")
    classes, iou = tuple(map(str, values["classes"])), tuple(map(_number, values["iou"]))
    if any(len(row) != len(classes) for row in (iou, *([confusion, *confusion] if confusion is not None else ()))):
        raise ValueError(f"not of {len(classes)} classes")
    return ScoreRecord(
        shards=shards,
        step=None if step is None else int(step),
        classes=classes,
        iou=iou,
        mean_iou=_number(values["mean_iou"]),
        pixel_accuracy=_number(values["pixel_accuracy"]),
        images=int(values["images"]),
        confusion=None if confusion is None else tuple(tuple(map(_number, row)) for row in confusion),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
