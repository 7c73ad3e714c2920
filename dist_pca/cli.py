"""The `dist-pca` command: argument parsing and output only.

Subpackages are imported inside the commands that need them, so that `--help` does not wait for torch.
"""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import dist_pca
from dist_pca.console import DEBUG, QUIET, plain_console, print_error
from dist_pca.errors import UserError
from dist_pca.evaluation.commands import app as evaluation_app
from dist_pca.options import Launcher, Processes, Resume
from dist_pca.resources import names
from dist_pca.shards.commands import app as shards_app
from dist_pca.tools.bench.commands import app as bench_app
from dist_pca.tools.cluster.commands import app as cluster_app
from dist_pca.tools.doctor.commands import app as doctor_app
from dist_pca.tools.matches.commands import app as matches_app
from dist_pca.tools.planning.commands import app as planning_app
from dist_pca.tools.report.commands import app as report_app
from dist_pca.tools.study.commands import app as study_app

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train semantic segmentation that adapts to a new domain without labels, on one GPU or many.",
)
app.add_typer(evaluation_app)
app.add_typer(cluster_app)
app.add_typer(study_app)
app.add_typer(matches_app)
app.add_typer(report_app)
app.add_typer(planning_app)
app.add_typer(doctor_app)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")

_TRAIN_EXAMPLES = """
[bold]Examples[/]

dist-pca train gta5_to_cityscapes data.source=data/gta5 data.target=data/cityscapes_train

dist-pca train my_run.yaml training.steps=2000 objective.association.scope=world --launcher accelerate/gpu_zero3

dist-pca train my_run.yaml training.steps=4000 --resume

dist-pca train my_run.yaml --profile 100:5
"""


def main() -> None:
    """Run the command line. An error that the user can fix is printed as one red line, without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="dist-pca")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            # What remains in the buffer would fail again when the interpreter flushes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail(f"the output cannot be written ({error}); make room or write it elsewhere")
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; correct the path or its permissions (--debug shows where)")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print_error(message)
    sys.exit(UserError.EXIT_CODE)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(dist_pca.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors too.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors alone, and no progress.")
    ] = False,
) -> None:
    for name, wanted in ((DEBUG, debug), (QUIET, quiet)):
        if wanted:
            os.environ[name] = "1"


@app.command("train", epilog=_TRAIN_EXAMPLES)
def train(
    config: Annotated[
        str, typer.Argument(help=f"A YAML file, or one that comes with dist-pca: {', '.join(names('configs'))}.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=100")] = None,
    launcher: Launcher = None,
    processes: Processes = None,
    profile: Annotated[
        str | None, typer.Option(metavar="START:STEPS", help="Trace these steps into the run folder's profile/.")
    ] = None,
    resume: Resume = None,
) -> None:
    """Train on this machine, and print the [bold]accelerate launch[/] command that is run.

    A run resumes from its newest checkpoint by default. On Ctrl-C, SIGTERM, SIGUSR1 or when training.time_limit is
    reached, it saves a checkpoint and exits; a second signal exits at once.

    Exit codes: 0 all steps are done, 2 an error that you can fix, 65 diverged, 69 a rank was lost, 75 checkpoint saved
    and the run must be restarted, 130 checkpoint saved after Ctrl-C.
    """
    from dist_pca.config.telemetry import profile_overrides
    from dist_pca.resilience.launch import launch, launch_command, machine_count, process_count, quote_command
    from dist_pca.train import resolve_config
    from dist_pca.training.prepare import prepare_run
    from dist_pca.training.run_folder import is_finished

    settings = [*(overrides or []), *(profile_overrides(profile) if profile else [])]
    run = resolve_config(config, settings)
    stage = run.training.zero_stage
    command = launch_command(config, settings, launcher=launcher, processes=processes, zero_stage=stage, resume=resume)
    # Report config errors here: the launcher would add a traceback of its own to every failure.
    processes = process_count(command)
    prepare_run(run, world_size=processes, resume=resume, local_ranks=max(1, processes // machine_count(command)))
    console = plain_console(stderr=True, soft_wrap=True)
    if is_finished(run):
        console.print(f"{run.folder}: all {run.training.steps} steps are done already")
        return
    console.print(quote_command(command), style="dim")
    sys.exit(launch(command, run.folder))


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and pictures.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for all three runs, for example training.precision=bf16")
    ] = None,
) -> None:
    """Draw streets by day and by night, train on the source alone, without association and with all terms, and compare.

    Parts that exist already are reused; remove the folder to start from scratch.
    """
    from dist_pca.tools.demo.run import run_demo

    run_demo(out, overrides or [])


if __name__ == "__main__":
    main()
