"""Studies whose runs are folders written by hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dist_pca.config import save_config
from dist_pca.evaluation.report import Scores
from dist_pca.shards.manifest import load_manifest
from dist_pca.tools.study.design import PlannedRun, Study, Variant, build_study
from dist_pca.tools.study.scoring import remember_scores
from tests.support.shards import CLASSES, make_shards

STEPS = 4


def small_study(folder: Path, **keys: object) -> Study:
    """Two variants under three seeds, scored on `folder`/test."""
    if not (folder / "test").exists():
        make_shards(folder / "test", [2])
    values: dict[str, object] = {
        "out": folder / "out",
        "tests": (str(folder / "test"),),
        "variants": (Variant("plain", ()), Variant("slow", ("optimizer.lr=1e-5",))),
        "settings": (f"training.steps={STEPS}",),
    }
    return build_study("demo", **(values | keys))  # type: ignore[arg-type]


def scores_of(iou: Sequence[float], label_sets: Mapping[str, float] | None = None) -> Scores:
    names = tuple(info.name for info in CLASSES)
    return Scores(names, tuple(iou), sum(iou) / len(iou), 0.5, 2, dict(label_sets or {}))


def write_started(study: Study, run: PlannedRun, step: int = 0) -> None:
    """What training leaves after some steps, apart from weights."""
    config = study.resolve(run)
    (run.folder / "checkpoints").mkdir(parents=True)
    save_config(config, run.folder / "config.yaml")
    (run.folder / "classes.json").write_text(json.dumps([asdict(info) for info in CLASSES]))
    lines = [{"step": made, "seconds_per_step": float(made), "peak_memory_bytes": made} for made in range(1, step + 1)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if step:
        checkpoint = checkpoint_of(run.folder, step)
        checkpoint.mkdir()
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "code": "1"}))
        (run.folder / "checkpoints" / "latest").write_text(checkpoint.name + "\n")


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def write_finished(study: Study, run: PlannedRun, scores: Scores) -> None:
    """A run that has made all steps and is scored on the study's test shards."""
    write_started(study, run, STEPS)
    for test in study.tests:
        remember_scores(run.folder, load_manifest(test), checkpoint_of(run.folder, STEPS), scores)
