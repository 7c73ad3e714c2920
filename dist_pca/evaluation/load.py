"""Load the network of a run folder."""

from pathlib import Path

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_network
from dist_pca.training.checkpoint import Weights, latest_checkpoint, pointed_at, whole_checkpoints
from dist_pca.training.checkpoint_loading import has_ema, load_model
from dist_pca.training.run_folder import read_run


def load_run(
    folder: Path, checkpoint: str | None = None, *, weights: Weights | None = None
) -> tuple[RunConfig, tuple[ClassInfo, ...], Segmenter]:
    """Load a run's config, class table and network, which is in evaluation mode on the CPU.

    Args:
        folder: The run folder.
        checkpoint: Step or name of a checkpoint, or `best`; None loads the newest.
        weights: The moving average or the trained weights; None loads the average if the checkpoint has one.

    Raises:
        UserError: the folder is not a run, has no checkpoint or not this one, or no such weights.
    """
    config, classes = read_run(folder)
    chosen = find_checkpoint(folder, checkpoint)
    model = build_network(config.model, len(classes))
    load_model(model, chosen, ema=weights == "ema" or (weights is None and has_ema(chosen)))
    return config, classes, model.eval()


def find_checkpoint(folder: Path, wanted: str | None = None) -> Path:
    """Find a checkpoint of a run folder by its step, its name or `best`; None loads the newest.

    Raises:
        UserError: there is none, or not this one.
    """
    if wanted is None:
        if (newest := latest_checkpoint(folder / "checkpoints")) is not None:
            return newest
        raise UserError(f"{folder}: has no checkpoint yet; train it first, or lower training.checkpoint_every")
    if wanted == "best" and (best := pointed_at(folder / "checkpoints", "best")) is not None:
        return best
    name = f"step-{int(wanted):08d}" if wanted.isdecimal() else wanted
    there = {path.name: path for path in whole_checkpoints(folder / "checkpoints")}
    if name not in there:
        raise UserError(f"checkpoint {wanted}: not in {folder}, which has {', '.join(there) or 'none'}")
    return there[name]
