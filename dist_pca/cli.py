"""The `dist-pca` command: parsing and printing, nothing else.

Rooms are imported inside the commands that need them, so that `--help` does not wait for torch.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import dist_pca
from dist_pca.bench.commands import app as bench_app
from dist_pca.errors import UserError
from dist_pca.resources import names

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train semantic segmentation that adapts to a new domain without labels, on one GPU or many.",
)
shards_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Turn raw data sets into WebDataset shards, and look at them.",
)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")

_BUILD_EXAMPLES = """
[bold]Examples[/]

dist-pca shards build gta5 --root raw/GTA5 --out data/gta5

dist-pca shards build cityscapes --root raw/cityscapes --out data/city_train --split train --unlabelled

dist-pca shards build cityscapes --root raw/cityscapes --out data/city_val --split val

dist-pca shards build camvid --root raw/camvid --out data/day --include '0006R0/*'

dist-pca shards build my_recipe.yaml --root raw/mine --out data/mine --max-edge 1280
"""

_INSPECT_EXAMPLES = """
[bold]Examples[/]

dist-pca shards inspect data/gta5

dist-pca shards inspect data/gta5 --grid gta5.png --samples 20

dist-pca shards inspect data/gta5 --json --verify
"""

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


@shards_app.command("recipes")
def list_recipes() -> None:
    """List the recipes that come with dist-pca."""
    from dist_pca.shards.recipe import load_recipe

    table = Table("recipe", "splits", "data set")
    for name in names("shards"):
        recipe = load_recipe(name)
        table.add_row(name, ", ".join(recipe.splits), recipe.description)
    Console().print(table)


@shards_app.command("build", epilog=_BUILD_EXAMPLES)
def build(
    recipe: Annotated[
        str, typer.Argument(help=f"A shipped recipe ({', '.join(names('shards'))}) or the path of a YAML file.")
    ],
    root: Annotated[Path, typer.Option(help="Folder of the raw data set.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the shards and their manifest.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split of the recipe; needed where it has several.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that write shards.", show_default="one per core")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Take only images whose path below the root matches this glob; * spans folders. Repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out images that match. Repeatable.")] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Leave labels out, even where there are some.")] = (
        False
    ),
    image_format: Annotated[
        Literal["keep", "jpg", "png", "webp"],
        typer.Option(help="How images are stored; keep copies JPEG, PNG and WebP files byte for byte."),
    ] = "keep",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of encoded JPEG and WebP images.")] = 90,
    max_edge: Annotated[
        int | None, typer.Option(min=1, help="Shrink images whose longer edge has more pixels than this.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each shard.")] = 256,
    force: Annotated[bool, typer.Option("--force", help="Replace the shards that --out holds.")] = False,
) -> None:
    """Build shards from a raw data set.

    Shards are plain WebDataset tars, the same bytes whatever the number of workers.
    An interrupted build leaves nothing half-written; a build that is already there is not repeated.
    """
    from dist_pca.shards.build import build_shards

    console = Console(stderr=True)
    start = time.perf_counter()
    done = 0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, speed="")

        def show(samples: int, total: int, stored: int) -> None:
            nonlocal done
            done = samples
            seconds = max(time.perf_counter() - start, 1e-9)
            speed = f"{samples / seconds:.0f} images/s, {stored / seconds / 1e6:.1f} MB/s, left"
            bar.update(task, completed=samples, total=total, speed=speed)

        manifest = build_shards(
            recipe,
            root,
            out,
            split=split,
            workers=workers,
            include=include or (),
            exclude=exclude or (),
            unlabelled=unlabelled,
            image_format=image_format,
            quality=quality,
            max_edge=max_edge,
            samples_per_shard=samples_per_shard,
            force=force,
            progress=show,
        )
    seconds = time.perf_counter() - start
    table = Table(title=str(out), title_justify="left")
    for name in ("samples", "shards", "MB", "seconds", "images/s"):
        table.add_column(name, justify="right")
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    speed = f"{manifest.samples / seconds:,.0f}" if done else "already built"
    table.add_row(f"{manifest.samples:,}", f"{len(manifest.shards):,}", f"{megabytes:,.1f}", f"{seconds:.1f}", speed)
    Console().print(table)


@shards_app.command("inspect", epilog=_INSPECT_EXAMPLES)
def inspect(
    folder: Annotated[Path, typer.Argument(help="A shard folder.", show_default=False)],
    grid: Annotated[
        Path | None, typer.Option(help="Write a PNG of samples with their labels laid over and a legend.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples in the grid.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and compare its checksum.")] = False,
) -> None:
    """Show what a shard folder holds: samples, sizes, and each class's share."""
    from dist_pca.shards.inspect import render, save_grid, summarise
    from dist_pca.shards.manifest import load_manifest, verify_checksums

    manifest = load_manifest(folder)
    if verify:
        verify_checksums(manifest)
    summary = summarise(manifest)
    if as_json:
        typer.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        Console().print(render(summary))
    if grid is not None:
        save_grid(manifest, grid, samples)


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
