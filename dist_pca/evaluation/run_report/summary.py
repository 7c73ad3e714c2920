"""Sections of what ran: result, time by phase, settings and environment."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from dist_pca.config import RunConfig
from dist_pca.console import duration
from dist_pca.data.addresses import redact
from dist_pca.evaluation.run_report.curves import speed_charts
from dist_pca.evaluation.run_report.page import Block, Cell, Code, Facts, Section, Table
from dist_pca.evaluation.run_report.record import RunRecord, is_number
from dist_pca.evaluation.run_report.scores import shown_scores
from dist_pca.resilience.exit_status import ExitCode

_STATES: dict[int, str] = {
    ExitCode.DONE: "finished",
    ExitCode.REFUSED: "ended with an error",
    ExitCode.DIVERGED: "diverged",
    ExitCode.LOST_RANK: "lost a rank",
    ExitCode.SAVED: "stopped and saved",
    ExitCode.INTERRUPTED: "interrupted and saved",
}
PHASES = {
    "data": "waiting for data",
    "teacher": "teacher and views",
    "forward": "forward",
    "association": "association",
    "communication": "of it waiting for other ranks",
    "backward": "backward",
    "optimizer": "optimizer",
    "validation": "validation",
    "checkpoint": "checkpoint",
    "log": "log",
}
"""Phases of a step, as `seconds` in metrics.jsonl has them, in words."""
_MISSING = "not known"


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """Names of the runs' folders, or their paths where two have the same name."""
    names = [record.name for record in records]
    return [name if names.count(name) == 1 else str(record.folder) for name, record in zip(names, records, strict=True)]


def lead(record: RunRecord, name: str) -> str:
    """Summarise a run in one line."""
    steps = _planned(record)
    parts = [f"{name}: {_state(record)}, {record.step:,}{f' of {steps:,}' if steps else ''} steps"]
    if record.seconds is not None:
        parts.append(f"in {duration(record.seconds)}")
    text = " ".join(parts)
    best = _result(record)
    return f"{text}; {best[0]} % mIoU {best[1]}" if best else text


def summary_section(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Result, data, network, terms and cost of each run."""
    columns = [_column(record) for record in records]
    rows: list[list[Cell | str]] = [
        [key, *(column[key] for column in columns)] for key in columns[0] if any(c[key] for c in columns)
    ]
    blocks: list[Block] = [Facts(_facts(records[0]))] if len(records) == 1 else []
    return Section("Summary", [*blocks, Table("What ran, on what, and what came out", ["", *names], rows)])


def time_section(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Where a step's time goes, and how speed and memory developed."""
    paces = [record.mean_per_step("seconds_per_step") for record in records]
    phases = [{phase: record.mean_per_step(f"seconds/{phase}") for phase in PHASES} for record in records]
    blocks: list[Block] = []
    if any(paces):
        rows: list[list[Cell | str]] = []
        for phase, title in PHASES.items():
            cells = [_time_cell(each[phase], pace) for each, pace in zip(phases, paces, strict=True)]
            if any(cell.share for cell in cells):
                rows.append([title, *cells])
        rows.append(["elsewhere", *(_time_cell(_rest(each, p), p) for each, p in zip(phases, paces, strict=True))])
        rows.append(["whole step", *(_time_cell(pace, None) for pace in paces)])
        blocks.append(Table("Seconds of a step by phase, mean over steps and ranks", ["", *names], rows, "bars"))
    return Section("Time", [*blocks, *speed_charts(records, names)])


def settings_section(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Keys that differ between runs, and the whole config of each."""
    configs = [{} if r.config is None else _shareable(r.config.model_dump(mode="json")) for r in records]
    blocks: list[Block] = []
    if len(records) > 1:
        flat = [dict(_flat(config)) for config in configs]
        keys = list(dict.fromkeys(key for each in flat for key in each))
        rows = [
            [key, *(str(each.get(key, "")) for each in flat)]
            for key in keys
            if key not in ("name", "output") and len({str(each.get(key)) for each in flat}) > 1
        ]
        if rows:
            blocks.append(Table("Keys that differ", ["", *names], rows))
    blocks += [
        Code(f"Config of {name}", OmegaConf.to_yaml(OmegaConf.create(config)))
        for name, config in zip(names, configs, strict=True)
        if config
    ]
    return Section("Settings", blocks)


def environment_section(records: Sequence[RunRecord], names: Sequence[str]) -> Section:
    """Versions, device, command and launches of each run."""
    columns = []
    for record in records:
        column = {key: _words(value) for key, value in record.environment.items()}
        if record.launches:
            first = record.launches[0]
            column["started"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(first.time))
            column["launches"] = str(len(record.launches))
            worlds = [str(launch.world_size) for launch in record.launches]
            if len(set(worlds)) > 1:
                column["ranks of each launch"] = ", ".join(worlds)
        columns.append(column)
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key, *(column.get(key, "") for column in columns)] for key in keys]
    return Section("Environment", [Table("Software, device and launches", ["", *names], rows)] if rows else [])


def _column(record: RunRecord) -> dict[str, str]:
    result, seconds, config = _result(record), record.seconds, record.config
    return {
        "state": _state(record),
        "result": "" if result is None else f"{result[0]} % mIoU {result[1]}",
        "source": _shards(record, "source"),
        "target": _shards(record, "target"),
        "network": "" if config is None else _network(config, len(record.classes)),
        "terms and their weights": "" if config is None else _terms(config),
        "batch": "" if config is None else _batch(config),
        "ranks": _ranks(record),
        "time": "" if seconds is None else duration(seconds),
    }


def _facts(record: RunRecord) -> list[tuple[str, str, str]]:
    facts = []
    if best := _result(record):
        facts.append(("mean IoU", f"{best[0]} %", best[1]))
    steps = _planned(record)
    facts.append(("steps", f"{record.step:,}", f"of {steps:,}, {_state(record)}" if steps else _state(record)))
    if record.seconds is not None:
        pace = record.mean_per_step("seconds_per_step") or 0.0
        facts.append(("time", duration(record.seconds), f"{pace:.3g} s per step"))
    if (rate := record.mean_per_step("images_per_second")) is not None:
        facts.append(("images per second", f"{rate:,.1f}", _ranks(record)))
    if is_number(peak := record.last("peak_memory_bytes")):
        facts.append(("peak memory", f"{peak / 2**30:.2f} GiB", "of the highest rank"))
    return facts


def _result(record: RunRecord) -> tuple[str, str] | None:
    """Mean IoU in per cent and what it was measured on; None where nothing was scored."""
    if scores := shown_scores(record):
        score = list(scores.values())[-1]
        return f"{100 * score.mean_iou:.1f}", f"on {score.images:,} images" + (
            f" of {redact(score.shards)}" if score.shards else ""
        )
    if is_number(validated := record.last("validation_mean_iou")):
        return f"{100 * validated:.1f}", "on data.validation"
    return None


def _state(record: RunRecord) -> str:
    if record.exit is not None:
        return _STATES.get(record.exit.code, "ended with an error")
    return "finished" if 0 < _planned(record) <= record.step else "not ended, or killed"


def _planned(record: RunRecord) -> int:
    return 0 if record.config is None else record.config.training.steps


def _shards(record: RunRecord, domain: str) -> str:
    folders = record.data.get(domain)
    if isinstance(folders, list) and folders:
        return "; ".join(
            f"{redact(str(each.get('folder')))}, {each.get('samples'):,} images"
            for each in folders
            if isinstance(each, dict) and isinstance(each.get("samples"), int)
        )
    if record.config is None or (domain == "target" and not record.config.objective.adapt):
        return ""
    return "; ".join(redact(str(folder)) for folder in record.config.data.folders(domain))  # type: ignore[arg-type]


def _network(config: RunConfig, classes: int) -> str:
    return f"{config.model.backbone}, head {config.model.head}" + (f", {classes} classes" if classes else "")


def _terms(config: RunConfig) -> str:
    objective = config.objective
    weights = {name: section.weight for name, section in objective if hasattr(section, "weight")}
    if not objective.adapt:
        weights = {name: weights[name] for name in ("dice", "lovasz", "source_contrast", "feature_distance")}
    return ", ".join(["ce 1", *(f"{name} {weight:g}" for name, weight in weights.items() if weight > 0)])


def _batch(config: RunConfig) -> str:
    training, crop = config.training, config.data.crop
    images = f"{training.source_batch} source"
    images += f" and {training.target_batch} target images" if config.objective.adapt else " images"
    return f"{images} of {crop[0]} x {crop[1]}, {training.precision}"


def _ranks(record: RunRecord) -> str:
    ranks = record.environment.get("world_size")
    if not isinstance(ranks, int):
        return ""
    return f"{ranks} rank{'s' * (ranks != 1)} on {record.environment.get('device', _MISSING)}"


def _time_cell(seconds: float | None, pace: float | None) -> Cell:
    if seconds is None:
        return Cell("-")
    share = seconds / pace if pace else None
    return Cell(f"{seconds:.3f}" + ("" if share is None else f" ({100 * share:.0f} %)"), share)


def _rest(phases: Mapping[str, float | None], pace: float | None) -> float | None:
    """Seconds of a step in no phase; communication is a part of the association."""
    if pace is None:
        return None
    return max(0.0, pace - sum(seconds or 0.0 for phase, seconds in phases.items() if phase != "communication"))


def _shareable(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what may be secret: passwords and signatures in URLs, and trackers' options."""
    config["telemetry"]["tracker_options"] = dict.fromkeys(config["telemetry"]["tracker_options"], "...")
    cleaned: dict[str, Any] = _redacted(config)
    return cleaned


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def _words(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    words = [str(word) for word in value]
    return " ".join(_redacted_word(word) for word in words)


def _redacted_word(word: str) -> str:
    if word.startswith("telemetry.tracker_options"):
        return f"{word.partition('=')[0]}=..."
    return re.sub(r"\w+://[^\s,'\"\]}]+", lambda url: redact(url[0]), word)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for key, value in values.items()
        for pair in (_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    ]
