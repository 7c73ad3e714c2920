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

_BUILD_EXAMPLES = """
[bold]Examples[/]

dist-pca shards build gta5 --root ~/data/GTA5 --out shards/gta5

dist-pca shards build cityscapes --root ~/data/cityscapes --out shards/city_train --split train --unlabelled

dist-pca shards build cityscapes --root ~/data/cityscapes --out shards/city_val --split val

dist-pca shards build camvid --root ~/data/camvid --out shards/day --include '0006R0/*'

dist-pca shards build my_recipe.yaml --root ~/data/mine --out shards/mine --max-edge 1280
"""

_INSPECT_EXAMPLES = """
[bold]Examples[/]

dist-pca shards inspect shards/gta5

dist-pca shards inspect shards/gta5 --grid gta5.png --samples 20

dist-pca shards inspect shards/gta5 --json --verify
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
