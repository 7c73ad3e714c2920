"""The demonstration's network and objective on few streets, as benches of whole runs train it."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from dist_pca.errors import UserError
from dist_pca.resilience.launch import launch_command
from dist_pca.resources import resource
from dist_pca.shards.build import build_shards
from dist_pca.tools.demo.streets import DAY, DUSK, write_streets


def train_demonstration(
    folder: Path, module: str = "dist_pca.train", settings: Mapping[str, object] | None = None, **training: int
) -> Path:
    """Train it from scratch, with association from the first step, on two processes or on all GPUs.

    Args:
        folder: An empty folder.
        module: What ranks run.
        settings: Further keys of the run, in full.
        training: Keys under `training.`.

    Returns:
        The run folder.

    Raises:
        UserError: the run fails.
    """
    for name, look, first in (("day", DAY, 0), ("dusk", DUSK, 32)):
        write_streets(folder / f"raw_{name}", look, split=name, indices=range(first, first + 32), seed=0)
        build_shards("folder", folder / f"raw_{name}", folder / name, unlabelled=name == "dusk")
    keys = {
        "name": "bench",
        "output": folder,
        "data.source": folder / "day",
        "data.target": folder / "dusk",
        "model.weights": "scratch",
        "objective.association.start_step": 0,
        **{f"training.{key}": value for key, value in training.items()},
        **(settings or {}),
    }
    launch = launch_command(str(resource("configs", "demo")), [f"{key}={value}" for key, value in keys.items()])
    command = [module if part == "dist_pca.train" else part for part in launch]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise UserError(f"bench: the run ended with exit code {run.returncode}: {run.stderr[-500:]}")
    return folder / "bench"
