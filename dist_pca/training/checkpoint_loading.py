"""Loading from a checkpoint: the one that all ranks find, that its files are its own, and weights into a network."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dist_pca.distributed import gather_objects
from dist_pca.errors import UserError
from dist_pca.training.checkpoint import abbreviate, latest_checkpoint, read_state
from dist_pca.training.deepspeed import persistent_buffers


def common_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint from which all ranks resume. Collective.

    Ranks that resumed from different ones would train on a mixture: weights of rank 0, and optimiser, moving average,
    learning rate and samples of others.

    Args:
        folder: The run folder's `checkpoints`, which all ranks should see alike.

    Returns:
        The checkpoint; None if there is none.

    Raises:
        UserError: on every rank, they find different checkpoints, and the message names hosts, ranks and what each has
            found; or none of those that are there can be read.
    """
    checkpoint, failure, found = None, None, "no checkpoint"
    try:
        checkpoint = latest_checkpoint(folder)
        if checkpoint is not None:
            digest = hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()
            found = f"{checkpoint.name} with state.json {digest[:12]}"
    except (UserError, OSError) as error:
        failure = found = str(error)
    ranks: dict[str, dict[str, list[str]]] = {}
    for number, (host, what) in enumerate(gather_objects((socket.gethostname(), found))):
        ranks.setdefault(what, {}).setdefault(host, []).append(str(number))
    if len(ranks) > 1:
        seen = (
            f"{what} on {abbreviate([f'{host} (rank {abbreviate(numbers)})' for host, numbers in hosts.items()])}"
            for what, hosts in ranks.items()
        )
        raise UserError(
            f"{folder}: not the same on all ranks: {'; '.join(seen)}; set output to a folder that all machines share, "
            "or wait until it is in sync, and start the run again"
        )
    if failure is not None:
        raise UserError(failure)
    return checkpoint


def load_model(model: torch.nn.Module, checkpoint: Path, *, ema: bool = False) -> None:
    """Load a checkpoint's weights and buffers into a model that DeepSpeed has not partitioned yet.

    Args:
        model: The model.
        checkpoint: The checkpoint.
        ema: The moving average rather than the trained weights.

    Raises:
        UserError: the file is missing or damaged, or belongs to another network; the message names what differs.
    """
    if ema and not has_ema(checkpoint):
        raise UserError(f"{checkpoint}: has no moving average (training.ema_decay was 0); use the trained weights")
    state = load_tensors(checkpoint / ("ema.safetensors" if ema else "model.safetensors"))
    own = dict(model.named_parameters()) | dict(persistent_buffers(model))
    differences: dict[str, list[str]] = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "other shapes:": [],
        "other types:": [],
    }
    for name in sorted(own.keys() & state.keys()):
        theirs, ours = state[name], own[name]
        if theirs.shape != ours.shape:
            difference = f"{name} {list(theirs.shape)} where the config has {list(ours.shape)}"
            differences["other shapes:"].append(difference)
        if theirs.is_floating_point() != ours.is_floating_point():
            types = (str(tensor.dtype).removeprefix("torch.") for tensor in (theirs, ours))
            differences["other types:"].append(f"{name} {' where the network has '.join(types)}")
    if found := [f"{what} {abbreviate(names)}" for what, names in differences.items() if names]:
        raise UserError(
            f"{checkpoint}: belongs to another network than model.* and the classes describe: {'; '.join(found)}; "
            "use the config it was trained with"
        )
    model.load_state_dict(state, strict=False)


def check_files(checkpoint: Path) -> None:
    """Check that all files of a checkpoint are there and that none is of another checkpoint.

    Raises:
        UserError: one is missing, damaged or of another checkpoint.
    """
    state = read_state(checkpoint)
    for name in state.get("files", []):
        path = checkpoint / Path(name).name
        with _readable(path), safe_open(path, "pt") as tensors:
            owner = (tensors.metadata() or {}).get("checkpoint")
        if owner != state.get("id"):
            raise UserError(
                f"{path}: is of another checkpoint than state.json beside it; put its own back, or point "
                "checkpoints/latest at another step-*"
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Refuse a file of tensors that is missing, or that cannot be read while the context is open."""
    # A named pipe would be waited for.
    if not path.is_file():
        raise UserError(f"{path}: missing; put it back, or point checkpoints/latest at another step-*")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); point checkpoints/latest at another step-*") from None


def has_ema(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved with a moving average of the weights.

    Raises:
        UserError: its `state.json` cannot be read.
    """
    if (checkpoint / "ema.safetensors").is_file() or not (checkpoint / "state.json").is_file():
        return (checkpoint / "ema.safetensors").is_file()
    return "ema.safetensors" in read_state(checkpoint).get("files", [])


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load a file of tensors by name.

    Raises:
        UserError: it is missing or damaged.
    """
    with _readable(path):
        return load_file(path)
