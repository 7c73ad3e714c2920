"""A small run: drawn streets in shards, a tiny network, two processes."""

import subprocess
import sys
from pathlib import Path

from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.tools.demo.streets import DAY, DUSK, write_streets


def build_streets(folder: Path) -> None:
    """Shards `day` and `dusk` of a few labelled streets each."""
    for name, look, first in (("day", DAY, 0), ("dusk", DUSK, 10)):
        write_streets(folder / "raw" / name, look, split=name, indices=range(first, first + 6), seed=0, size=(64, 96))
        build_shards("folder", folder / "raw" / name, folder / name, samples_per_shard=2, workers=1)


def overrides(folder: Path, name: str, *more: str) -> list[str]:
    return [
        *(f"name={name}", f"output={folder}/runs", f"data.source={folder}/day", f"data.target={folder}/dusk"),
        *("data.workers=1", "data.shorter_edge=[40,56]", "data.crop=[40,56]", "evaluation.input_size=null"),
        *("model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null", "model.head_channels=16"),
        *(
            "objective.association.start_step=1",
            # Small streets have few pixels of any class.
            "data.sampling.source=uniform",
            "training.steps=6",
            "training.log_every=1",
            "training.checkpoint_every=3",
        ),
        *("training.source_batch=4", "training.target_batch=4", "optimizer.lr=1e-4", "telemetry.report=false"),
        *more,
    ]


def launch(
    folder: Path,
    name: str,
    *more: str,
    launcher: str = "accelerate/cpu",
    launcher_options: tuple[str, ...] = (),
    module: str = "dist_pca.train",
) -> "subprocess.CompletedProcess[str]":
    """`accelerate launch` of the run on two CPU processes, or on those of another launcher."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(resource("launch", launcher)),
    ]
    command += [
        *launcher_options,
        "-m",
        module,
        "demo",
        *overrides(folder, name, *more),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
