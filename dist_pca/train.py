"""Entry point of a training process.

accelerate launch --config_file launch/accelerate/cpu.yaml -m dist_pca.train CONFIG
"""

import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dist_pca.config import RunConfig, load_config
from dist_pca.console import erase_live_view, plain_console, print_error
from dist_pca.errors import UserError
from dist_pca.options import Resume
from dist_pca.resilience.exit_status import SUPERVISED, ExitCode, exit_process, write_exit_status
from dist_pca.resilience.preemption import StopRequest
from dist_pca.resources import resource

ERROR_DELAY = 30.0
"""Seconds for which another rank than 0 keeps an error in its set-up to itself, in case rank 0 prints the same."""


def resolve_config(name: str, overrides: list[str]) -> RunConfig:
    """Load a run's config from a file or a shipped config's name, and overrides."""
    path = Path(name)
    return load_config(
        path if path.suffix in (".yaml", ".yml") or path.is_file() else resource("configs", name), overrides
    )


def _print(message: str, *, always: bool = False) -> None:
    erase_live_view()
    plain_console(stderr=True, soft_wrap=True, always=always).print(message)


class LineHandler(logging.Handler):
    """Prints each message as one line on stderr, above the live view if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        _print(self.format(record), always=record.levelno >= logging.WARNING)


def _set_up_logging(rank: int) -> None:
    """Show this package's log on stderr, and silence warnings of libraries that the user can do nothing about.

    Every rank prints warnings. What all ranks would log alike is information, which rank 0 alone prints.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that are deprecated in newer versions of PyTorch.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    logger = logging.getLogger("dist_pca")
    logger.addHandler(LineHandler())
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # A library that has configured the root logger would print every message again.
    logger.propagate = False


def write_report(config: RunConfig) -> str:
    """Write the run's report if it is asked for; returns what a message adds about it. A failure is one warning."""
    if not config.telemetry.report:
        return ""
    from dist_pca.evaluation.run_report.report import write_run_report

    try:
        return f"; {write_run_report(config.folder)} shows the run"
    # Training is done and saved: nothing about a report may end it as a failure.
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _print(f"warning: no report of the run ({why})", always=True)
        return ""


def _fail(folder: Path, code: int, message: str) -> NoReturn:
    write_exit_status(folder, code, message)
    print_error(message)
    exit_process(folder, code)


def main(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config that comes with dist-pca.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=100")] = None,
    resume: Resume = None,
) -> None:
    """Train a run as one of the processes that `accelerate launch` started."""
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = resolve_config(config, overrides or [])
        _set_up_logging(rank)
        # A wrong key should be reported before these slow imports.
        import torch.distributed as dist

        from dist_pca.data.stream import LOST_LOADER
        from dist_pca.evaluation.training_pictures import training_pictures
        from dist_pca.evaluation.validation import validate
        from dist_pca.shards.manifest import describe_empty_classes
        from dist_pca.training.prepare import prepare_run
        from dist_pca.training.run_folder import is_finished
        from dist_pca.training.trainer import Trainer

        world_size, local_ranks = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        prepared = prepare_run(run, world_size=world_size, resume=resume, local_ranks=local_ranks)
        empty = {describe_empty_classes(source) for source in prepared.sources} - {""}
        for warning in [*empty, *run.unused_terms()]:
            if rank == 0:
                _print(f"warning: {warning}", always=True)
        if is_finished(run):
            if rank == 0:
                _print(f"{run.folder}: all {run.training.steps} steps are done already")
            return
    except UserError as error:
        if rank == 0:
            print_error(str(error))
        elif not stop.wait(ERROR_DELAY):
            # Mostly every rank finds the same error, and the launcher ends this one once rank 0 has printed it and
            # exited. Rank 0 does not have this one: files, packages or memory of this machine are others.
            print_error(f"rank {rank}: {error}")
        sys.exit(UserError.EXIT_CODE)
    with suppress(OSError):
        # For exit.json, even if the ranks do not find each other.
        run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with Trainer(prepared, stop, validate, training_pictures) as trainer:
            code = trainer.train()
            trainer.checkpoints.finish()
            # Once the first rank has exited, the launcher ends those that still write logs or the report.
            stop.ignore()
    except UserError as error:
        message = str(error) if error.EXIT_CODE == ExitCode.DIVERGED else f"rank {rank}: {error}"
        _fail(run.folder, error.EXIT_CODE, message)
    except RuntimeError as error:
        # PyTorch raises this wherever the main thread is when a loader process dies.
        if "DataLoader worker" not in str(error):
            raise
        _fail(run.folder, ExitCode.LOST_RANK, f"rank {rank}: {LOST_LOADER}")
    if rank == 0:
        saved = f"{run.folder}: saved after step {stop.step} of {run.training.steps}"
        message = saved if code == ExitCode.DONE else f"{stop.reason}: {saved}; run the same command again to resume"
        write_exit_status(run.folder, code, message)
        report = write_report(run)
        if code != ExitCode.DONE or report:
            _print(message + report)
    if dist.is_initialized():
        dist.destroy_process_group()
    # A gloo thread that still owns a tensor aborts the process if it meets the interpreter's shutdown.
    exit_process(run.folder, 0 if SUPERVISED in os.environ else code)


if __name__ == "__main__":
    typer.run(main)
