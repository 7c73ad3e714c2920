"""The commands `dist-pca shards verify`, `index` and `inspect`: shards that are there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_pca.classes import LABEL_SETS
from dist_pca.console import counted, plain_console, print_warning

if TYPE_CHECKING:
    from rich.console import Group

    from dist_pca.shards.check import Check
    from dist_pca.shards.manifest import Manifest
    from dist_pca.shards.verify import Verification

app = typer.Typer(rich_markup_mode="rich")

_VERIFY_EXAMPLES = """
[bold]Examples[/]

dist-pca shards verify data/gta5 --deep --json
"""

_INDEX_EXAMPLES = """
[bold]Examples[/]

dist-pca shards index data/theirs --label-set cityscapes_19

dist-pca shards index data/theirs --classes classes.yaml --image-member input.jpg --label-member mask.png

dist-pca shards index data/unlabelled
"""

_INSPECT_EXAMPLES = """
[bold]Examples[/]

dist-pca shards inspect data/gta5

dist-pca shards inspect data/gta5 --grid gta5.png --samples 20
"""

Workers = Annotated[int | None, typer.Option(min=1, help="Number of worker processes.", show_default="one per core")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_Folder = Annotated[Path, typer.Argument(help="A shard folder.", show_default=False)]


@app.command("verify", epilog=_VERIFY_EXAMPLES)
def verify(
    folder: _Folder,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also decode every image and label: damage, sizes, label values, pixels of each class."
        ),
    ] = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Check a shard folder against its manifest and list all problems; the exit code is 1 if there are any.

    Compares the sizes and checksums of the shards, and the key and offset of every sample.
    """
    from dist_pca.shards.progress import shown_progress
    from dist_pca.shards.report import problem_table
    from dist_pca.shards.verify import verify as check

    with shown_progress("samples") as show:
        found = check(folder, deep=deep, workers=workers, progress=show)
    size = f"{counted(found.shards, 'shard')}, {found.bytes / 1e6:,.1f} MB"
    where = f"{counted(found.samples, 'sample')}, {size}{', every image and label decoded' if deep else ''}"
    end_check(found, folder, where, problem_table(found) if found.problems else None, as_json=as_json)


@app.command("index", epilog=_INDEX_EXAMPLES)
def index(
    folder: Annotated[Path, typer.Argument(help="A folder of WebDataset shards, *.tar.", show_default=False)],
    classes: Annotated[
        Path | None, typer.Option(help="Class table by train id: a YAML list of {name: road, color: \\[128, 64, 128]}.")
    ] = None,
    label_set: Annotated[str | None, typer.Option(help=f"Class table by name: {', '.join(LABEL_SETS)}.")] = None,
    image_member: Annotated[
        str | None,
        typer.Option(
            help="Extension of the members that hold images, such as input.jpg.", show_default="jpg, jpeg, png or webp"
        ),
    ] = None,
    label_member: Annotated[
        str, typer.Option(help="Extension of the members that hold labels: 8-bit PNGs of train ids, 255 for ignore.")
    ] = "label.png",
    workers: Workers = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing manifest.")] = False,
) -> None:
    """Write a manifest for shards made by other tools, so that they can be used for training.

    Shards are only read; nothing is extracted. A class table is needed only if there are labels.
    """
    from dist_pca.shards.index import class_table, index_shards
    from dist_pca.shards.progress import shown_progress
    from dist_pca.shards.walk import walk

    table = class_table(classes, label_set)
    with shown_progress("shards") as show:
        manifest = index_shards(
            folder,
            classes=table,
            image_member=image_member,
            label_member=label_member,
            force=force,
            workers=workers,
            progress=show,
        )
    if manifest.labelled:
        labels = f"labels in {manifest.label_member}"
    else:
        first = walk(folder / manifest.shards[0].name)[0]
        labels = f"no labels in {manifest.label_member} (the first sample has {', '.join(sorted(first.members))})"
    print_empty_classes(manifest)
    typer.echo(f"{folder}: {counted(manifest.samples, 'sample')} in {counted(len(manifest.shards), 'shard')}, {labels}")


@app.command("inspect", epilog=_INSPECT_EXAMPLES)
def inspect(
    folder: _Folder,
    grid: Annotated[Path | None, typer.Option(help="Write a PNG of samples with overlaid labels and a legend.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples in the grid.")] = 12,
    as_json: AsJson = False,
) -> None:
    """Show the contents of a shard folder: samples, sizes, and each class's share of pixels."""
    from dist_pca.shards.inspect import render, save_grid, summarise
    from dist_pca.shards.manifest import load_manifest

    manifest = load_manifest(folder)
    summary = summarise(manifest)
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=2))
    else:
        plain_console().print(render(summary))
    if grid is not None:
        save_grid(manifest, grid, samples)


def end_check(
    found: "Check | Verification", folder: Path, where: str, tables: "Group | None", *, as_json: bool
) -> None:
    """Print the result of a check, as JSON or as tables and a line; the exit code is 1 if there are problems.

    Args:
        found: The result.
        folder: The folder that was checked.
        where: What was looked at in it, in words.
        tables: The result as tables; None where the line says all.
        as_json: Print JSON.
    """
    count = len(found.problems)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        if tables is not None:
            plain_console().print(tables)
        typer.echo(f"{folder}: {f'{count:,}' if count else 'no'} problem{'s' * (count > 1)} in {where}")
    if count:
        raise typer.Exit(1)


def print_empty_classes(manifest: "Manifest") -> None:
    """Warn of classes of which no label has a pixel."""
    from dist_pca.shards.manifest import describe_empty_classes

    if warning := describe_empty_classes(manifest):
        print_warning(warning)
