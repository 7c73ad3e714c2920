"""Scores of checkpoints, kept in their run folder as scores.json and not computed twice."""

import hashlib
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dist_pca.config import load_config
from dist_pca.errors import UserError
from dist_pca.evaluation.evaluate import evaluate
from dist_pca.evaluation.load import load_run
from dist_pca.evaluation.report import Scores
from dist_pca.files import write_json
from dist_pca.shards.manifest import Manifest
from dist_pca.training.checkpoint import latest_checkpoint, read_state


def manifest_digest(manifest: Manifest) -> str:
    """Digest of what a score on shards depends on: the samples, their shards' checksums and the classes."""
    shards = [[shard.sha256, shard.keys, shard.offsets] for shard in manifest.shards]
    content = [manifest.labelled, manifest.label_member, [info.name for info in manifest.classes], shards]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def cached_scores(run: Path, manifest: Manifest, checkpoint: Path) -> Scores | None:
    """What scores.json of a run folder holds for a checkpoint on shards, None where it holds nothing.

    Scores count as the same where checkpoint, shards and the run's evaluation protocol are. A step that is trained
    again makes another checkpoint.

    Raises:
        UserError: the checkpoint's state cannot be read.
    """
    key = _key(run, manifest, checkpoint)
    for entry in _entries(run):
        if {name: entry.get(name) for name in key} == key:
            with suppress(ValueError, KeyError, TypeError):
                return Scores.from_json(json.dumps(entry["scores"]))
    return None


def remember_scores(run: Path, manifest: Manifest, checkpoint: Path, scores: Scores) -> None:
    """Keep scores of a run's checkpoint in its scores.json, in the place of earlier ones of the kind."""
    key = _key(run, manifest, checkpoint)
    kept = [entry for entry in _entries(run) if {name: entry.get(name) for name in key} != key]
    entry = {**key, "shards": manifest.location, "scores": json.loads(scores.to_json())}
    # In a folder that cannot be written they are computed again.
    with suppress(OSError):
        write_json(run / "scores.json", [*kept, entry])


def score_newest(run: Path, manifest: Manifest) -> Scores:
    """Scores of a run's newest checkpoint; where they are not there yet, `dist-pca evaluate` computes them.

    It runs in processes of its own, one for each GPU, so that this one keeps no GPU memory while others train.

    Raises:
        UserError: the run has no checkpoint, or cannot be scored.
    """
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run}: has no checkpoint yet; train it first")
    if (scores := cached_scores(run, manifest, checkpoint)) is not None:
        return scores
    processes = torch.cuda.device_count()
    ranks = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m") if processes > 1 else ()
    words = ("evaluate", str(run), "--shards", manifest.location, "--checkpoint", checkpoint.name, "--json")
    done = subprocess.run(
        [sys.executable, "-m", *ranks, "dist_pca.cli", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(f"{run}: could not be scored on {manifest.location}; the lines above say why")
    scores = Scores.from_json(done.stdout)
    remember_scores(run, manifest, checkpoint, scores)
    return scores


def score_checkpoint(run: Path, manifest: Manifest, checkpoint: Path) -> Scores:
    """Scores of one checkpoint of a run; where they are not there yet, they are computed in this process.

    Raises:
        UserError: the run cannot be loaded or scored.
    """
    if (scores := cached_scores(run, manifest, checkpoint)) is not None:
        return scores
    config, classes, model = load_run(run, checkpoint.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = evaluate(model.to(device), manifest, classes, config, device=device)
    remember_scores(run, manifest, checkpoint, scores)
    return scores


def _key(run: Path, manifest: Manifest, checkpoint: Path) -> dict[str, Any]:
    state = read_state(checkpoint)
    config = load_config(run / "config.yaml")
    protocol = config.evaluation.model_dump(mode="json") | {"shorter_edge": list(config.data.shorter_edge)}
    identity = {"step": state["step"], "checkpoint": state.get("id")}
    return {**identity, "shards_digest": manifest_digest(manifest), "protocol": protocol}


def _entries(run: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads((run / "scores.json").read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
