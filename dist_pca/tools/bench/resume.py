"""A run that is killed again and again, compared with one that is not."""

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.resilience.launch import launch_command
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.tools.bench.report import Record
from dist_pca.tools.demo.streets import DAY, DUSK, write_streets
from dist_pca.training.checkpoint import latest_checkpoint
from dist_pca.training.metrics import TIMING

STEPS_A_KILL = 4
"""Steps of the run for each kill; a checkpoint is written every second one."""
PARTS = ("model", "optimizer", "ema", "statistics")


def measure_resume(folder: Path, kills: int, seed: int, tell: Callable[[str], object]) -> list[Record]:
    """Train a small network on two processes at ZeRO-2, twice; kill and start one of the two runs again and again.

    Every process of the run gets SIGKILL: at a random instant, or as soon as a checkpoint's files appear.

    Args:
        folder: An empty folder.
        kills: How often.
        seed: Seed of the random times of kills.
        tell: Called with a description of each step.

    Raises:
        UserError: a run ends by itself before it should.
    """
    draw_streets(folder)
    steps = STEPS_A_KILL * (kills + 1)
    tell("training without a kill")
    train_to_the_end(folder, "whole", steps)
    draw = random.Random(seed)
    made = inside_a_write = unreadable = 0
    while made < kills and read_exit_status(folder / "killed") is None:
        tell(f"kill {made + 1} of {kills}")
        before = _half_written(folder)
        with _started(folder, "killed", steps) as process:
            _wait_for_instant(folder / "killed", process, draw, aim_at_write=made % 2 == 1)
            # A run that ends by itself before it is killed has failed, or made its last step.
            made += process.poll() is None
            _kill_all(process)
        inside_a_write += bool(_half_written(folder) - before)
        unreadable += _unreadable(folder / "killed" / "checkpoints")
    tell("training to the end")
    train_to_the_end(folder, "killed", steps)
    return [
        {"name": "kills", "value": made},
        {"name": "kills_inside_a_checkpoint_write", "value": inside_a_write},
        {"name": "differing_tensors", "value": _differing_tensors(folder / "whole", folder / "killed")},
        {"name": "differing_metric_lines", "value": _differing_lines(folder / "whole", folder / "killed")},
        {"name": "unreadable_checkpoints", "value": unreadable},
    ]


def _half_written(folder: Path) -> set[int]:
    """What kills have left of checkpoints; by inode, as a later one may have the same name."""
    return {path.stat().st_ino for path in (folder / "killed" / "checkpoints").glob(".*.partial")}


def draw_streets(folder: Path) -> None:
    """Make the shards `day` and `dusk` that runs in a folder train on, where they are not there yet."""
    for name, look, first in (("day", DAY, 0), ("dusk", DUSK, 10)):
        raw = folder / f"raw_{name}"
        if not raw.is_dir():
            write_streets(raw, look, split=name, indices=range(first, first + 6), seed=0, size=(64, 96))
            build_shards("folder", raw, folder / name, unlabelled=name == "dusk", samples_per_shard=2, workers=1)


def train_to_the_end(folder: Path, name: str, steps: int, processes: int = 2, **settings: object) -> None:
    """Train a run of a small network, or resume it.

    Args:
        folder: Holds the shards; the run folder's parent.
        name: Of the run.
        steps: Its last one.
        processes: Ranks.
        settings: More keys of its config, with `__` for the dots.

    Raises:
        UserError: it ends otherwise.
    """
    with _started(folder, name, steps, processes, **settings) as process:
        process.wait()
    outcome = read_exit_status(folder / name)
    if outcome is None or outcome.code != ExitCode.DONE:
        said = (folder / f"{name}.log").read_text()[-500:]
        raise UserError(f"bench resume: the run {name} did not end as it should: {' '.join(said.split())}")


@contextmanager
def _started(
    folder: Path, name: str, steps: int, processes: int = 2, **more: object
) -> Iterator["subprocess.Popen[bytes]"]:
    settings = {
        "name": name,
        "output": folder,
        "data.source": folder / "day",
        "data.target": folder / "dusk",
        "data.workers": 1,
        "data.shorter_edge": "[40,56]",
        "data.crop": "[40,56]",
        "model.backbone": "test_resnet",
        "model.weights": "scratch",
        "model.output_stride": "null",
        "model.head_channels": 16,
        "objective.association.start_step": 1,
        "training.steps": steps,
        "training.source_batch": 4,
        "training.target_batch": 4,
        "training.zero_stage": 2,
        "training.ema_decay": 0.9,
        "training.log_every": 1,
        "training.checkpoint_every": 2,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    config = str(resource("configs", "demo"))
    command = launch_command(
        config,
        [f"{key}={value}" for key, value in settings.items()],
        launcher="accelerate/cpu",
        processes=processes,
        resume=True,
    )
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            _kill_all(process)


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        for member in (launcher, *launcher.children(recursive=True)):
            member.kill()
    process.wait()


def _wait_for_instant(
    run: Path, process: "subprocess.Popen[bytes]", draw: random.Random, *, aim_at_write: bool
) -> None:
    last, changes, rest = _lines(run)[-1:], draw.randrange(1, 2 * STEPS_A_KILL), draw.uniform(0, 0.3)
    while process.poll() is None and changes > 0:
        time.sleep(0.005)
        if (now := _lines(run)[-1:]) != last:
            last, changes = now, changes - 1
    if aim_at_write:
        while process.poll() is None and not any((run / "checkpoints").glob(".step-*.partial/*")):
            time.sleep(0.0005)
    else:
        time.sleep(rest)


def _lines(run: Path) -> list[str]:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.is_file() else []


def _unreadable(checkpoints: Path) -> int:
    """Folders that pass for a checkpoint and are none; `latest` that names none counts as one."""
    count = 0
    for checkpoint in checkpoints.glob("step-*"):
        try:
            json.loads((checkpoint / "state.json").read_text())
            for part in PARTS:
                load_file(checkpoint / f"{part}.safetensors")
        except (OSError, ValueError, SafetensorError):
            count += 1
    try:
        latest_checkpoint(checkpoints)
    except UserError:
        count += 1
    return count


def _differing_tensors(one: Path, other: Path) -> int:
    count = 0
    for part in PARTS:
        first, second = (_last(run, part) for run in (one, other))
        count += len(first.keys() ^ second.keys())
        count += sum(not torch.equal(first[name], second[name]) for name in first.keys() & second.keys())
    return count


def _last(run: Path, part: str) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint / f"{part}.safetensors")


def _differing_lines(one: Path, other: Path) -> int:
    first, second = ([_without_timing(line) for line in _lines(run)] for run in (one, other))
    return abs(len(first) - len(second)) + sum(a != b for a, b in zip(first, second, strict=False))


def _without_timing(line: str) -> dict[str, object]:
    return {name: value for name, value in json.loads(line).items() if name not in TIMING}
