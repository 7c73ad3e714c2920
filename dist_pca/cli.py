"""The `dist-pca` command: parsing and printing, nothing else.

Rooms are imported inside the commands that need them, so that `--help` does not wait for torch.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import dist_pca
from dist_pca.bench.commands import app as bench_app
from dist_pca.errors import UserError
from dist_pca.resources import names
from dist_pca.shards.commands import app as shards_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train semantic segmentation that adapts to a new domain without labels, on one GPU or many.",
)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")

_TRAIN_EXAMPLES = """
[bold]Examples[/]

dist-pca train gta5_to_cityscapes data.source=data/gta5 data.target=data/city_train

dist-pca train my_run.yaml training.steps=2000 objective.association.scope=world --launcher accelerate/gpu_zero3

dist-pca train my_run.yaml --resume
"""

_EVALUATE_EXAMPLES = """
[bold]Examples[/]

dist-pca evaluate runs/gta5_to_cityscapes --shards data/city_val

dist-pca evaluate runs/synthia_to_cityscapes --shards data/city_val --label-set synthia_13 --json

accelerate launch --config_file launch/accelerate/cpu.yaml -m dist_pca.cli evaluate runs/camvid --shards data/test
"""


def main() -> None:
    """Run the command line; an error that a user can mend is one red line, without a traceback."""
    try:
        app(prog_name="dist-pca")
    except UserError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(UserError.EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(dist_pca.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command("train", epilog=_TRAIN_EXAMPLES)
def train(
    config: Annotated[
        str, typer.Argument(help=f"A YAML file, or one that comes with dist-pca: {', '.join(names('configs'))}.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=100")] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="Accelerate's YAML file, or one that comes with dist-pca, for example accelerate/gpu_zero3.",
            show_default="one process per GPU, two on a CPU",
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint.")] = False,
) -> None:
    """Train on this machine, and print the [bold]accelerate launch[/] line that does it."""
    from dist_pca.train import resolve_config
    from dist_pca.training.launch import launch, launch_command, process_count, shown
    from dist_pca.training.loop import check

    run = resolve_config(config, overrides or [])
    command = launch_command(config, overrides or [], launcher=launcher, processes=processes, resume=resume)
    # What cannot run is said here, before a launcher that follows every failure with a traceback of its own.
    check(run, world_size=process_count(command), resume=resume)
    Console(stderr=True, soft_wrap=True, highlight=False).print(shown(command), style="dim", markup=False)
    sys.exit(launch(command))


@app.command("evaluate", epilog=_EVALUATE_EXAMPLES)
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    shards: Annotated[Path, typer.Option(help="Folder of labelled shards.", show_default=False)],
    label_set: Annotated[
        list[str] | None, typer.Option(help="Also the mean IoU of a named set, for example synthia_13. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score a run's newest checkpoint: IoU of each class, mean IoU and pixel accuracy."""
    from dist_pca.evaluation.evaluate import evaluate as score
    from dist_pca.evaluation.report import table
    from dist_pca.shards.manifest import load_manifest
    from dist_pca.training.engine import join_ranks
    from dist_pca.training.run import load_run

    manifest = load_manifest(shards)
    config, classes, model = load_run(run)
    if label_set:
        evaluation = config.evaluation.model_copy(update={"label_sets": tuple(label_set)})
        config = config.model_copy(update={"evaluation": evaluation})
    rank, world_size, device = join_ranks()
    scores = score(model.to(device), manifest, classes, config, device=device, rank=rank, world_size=world_size)
    if rank == 0:
        typer.echo(scores.to_json()) if as_json else Console().print(table(scores, f"{run} on {shards}"))


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and pictures.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for both runs, for example training.steps=50")
    ] = None,
) -> None:
    """Draw two looks of one street world, train with and without adaptation, and compare them on the second look.

    Parts that are already there are not made again; remove the folder to start afresh.
    """
    from dist_pca.demo.run import run_demo

    run_demo(out, overrides or [])


if __name__ == "__main__":
    main()
