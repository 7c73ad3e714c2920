"""Entry point of a training process.

accelerate launch --config_file launch/accelerate/cpu.yaml -m dist_pca.train CONFIG
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from dist_pca.config import RunConfig, load_config
from dist_pca.errors import UserError
from dist_pca.options import Resume
from dist_pca.resources import resource
from dist_pca.training.outcome import SUPERVISED, ExitCode, leave, record_outcome, say_error
from dist_pca.training.signals import StopRequest


def resolve_config(name: str, overrides: list[str]) -> RunConfig:
    """Load a run's config from a YAML file or a shipped config's name, and apply overrides."""
    path = Path(name)
    return load_config(
        path if path.suffix in (".yaml", ".yml") or path.is_file() else resource("configs", name), overrides
    )


def _set_up_logging() -> None:
    """Print this package's log records; silence library messages that every rank would repeat."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that are deprecated in newer versions of PyTorch.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    handler = RichHandler(
        console=Console(stderr=True, soft_wrap=True), show_time=False, show_level=False, show_path=False
    )
    ours = logging.getLogger("dist_pca")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    # If a library has configured the root logger, every record would be printed twice.
    ours.propagate = False


def _say(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(message, markup=False)


def main(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config that comes with dist-pca.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=100")] = None,
    resume: Resume = None,
) -> None:
    """Train a run in this process, which is one of those started by `accelerate launch`."""
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = resolve_config(config, overrides or [])
        _set_up_logging()
        # Imported after the config is parsed, so that a wrong key is reported without waiting for torch.
        import torch.distributed as dist

        from dist_pca.training.check import check
        from dist_pca.training.loop import train
        from dist_pca.training.resume import is_finished

        plan = check(run, world_size=int(os.environ.get("WORLD_SIZE", "1")), resume=resume)
        if is_finished(run):
            if rank == 0:
                _say(f"{run.folder}: all {run.training.steps} steps are done already")
            return
    except UserError as error:
        if rank != 0:
            # All ranks fail in the same way. Rank 0 prints the error; then the launcher ends this rank.
            stop.wait(30)
        else:
            say_error(str(error))
        sys.exit(UserError.EXIT_CODE)
    try:
        code = train(plan, stop)
    except UserError as error:
        message = str(error) if error.EXIT_CODE == ExitCode.DIVERGED else f"rank {rank}: {error}"
        record_outcome(run.folder, error.EXIT_CODE, message)
        say_error(message)
        leave(run.folder, error.EXIT_CODE)
    if rank == 0:
        made = f"{run.folder}: step {stop.step} of {run.training.steps} is done and saved"
        message = made if code == ExitCode.DONE else f"{stop.reason}: {made}; the same command resumes from there"
        record_outcome(run.folder, code, message)
        if code != ExitCode.DONE:
            _say(message)
    if dist.is_initialized():
        # Without this call, gloo's threads sometimes abort a finished process while the interpreter shuts down.
        dist.destroy_process_group()
    sys.exit(0 if SUPERVISED in os.environ else code)


if __name__ == "__main__":
    typer.run(main)
