"""The commands `dist-pca shards recipes`, `check`, `build` and `merge`: from raw data to shards."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from dist_pca.console import counted, plain_console, print_warning
from dist_pca.errors import UserError
from dist_pca.options import MaxPixels
from dist_pca.resources import names, resource
from dist_pca.shards.folder_commands import AsJson, Workers, end_check, print_empty_classes
from dist_pca.shards.folder_commands import app as folder_app

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dist_pca.shards.writer import Skipped

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Turn raw data sets into WebDataset shards, check them, and look at them.",
)
app.add_typer(folder_app)

_BUILD_EXAMPLES = """
[bold]Examples[/]

dist-pca shards build gta5 --root raw/GTA5 --out data/gta5 --dry-run

dist-pca shards build cityscapes --root raw/cityscapes --out data/cityscapes_train --split train --unlabelled

dist-pca shards build camvid --root raw/camvid --out data/day --include '0006R0/*'

dist-pca shards build my_recipe.yaml --root raw/mine --out data/mine --tile 512 512 --overlap 64 --shard-size 512MB

dist-pca shards build gta5 --root raw/GTA5 --out data/gta5 --task $SLURM_ARRAY_TASK_ID --tasks 8
"""

_MERGE_EXAMPLES = """
[bold]Examples[/]

dist-pca shards build gta5 --root raw/GTA5 --out data/gta5 --task 0 --tasks 2

dist-pca shards build gta5 --root raw/GTA5 --out data/gta5 --task 1 --tasks 2

dist-pca shards merge data/gta5
"""

_CHECK_EXAMPLES = """
[bold]Examples[/]

dist-pca shards check raw/mine --recipe folder

dist-pca shards check raw/cityscapes --recipe cityscapes --split val --json
"""

_Include = Annotated[
    list[str] | None,
    typer.Option(help="Take only images whose path below the root matches this glob; * spans folders. Repeatable."),
]
_Exclude = Annotated[list[str] | None, typer.Option(help="Leave out images whose path matches this glob. Repeatable.")]
_Unlabelled = Annotated[bool, typer.Option("--unlabelled", help="Leave labels out, even if there are any.")]


@app.callback()
def _root() -> None:
    pass


@app.command("recipes")
def list_recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, as a start for one of your own.")] = None,
) -> None:
    """List the recipes that come with dist-pca, or print one of them."""
    from dist_pca.shards.recipe import load_recipe

    if name is not None:
        typer.echo(resource("shards", name).read_text(encoding="utf-8"), nl=False)
        return
    table = Table("recipe", "splits", "data set")
    for name in names("shards"):
        recipe = load_recipe(name)
        table.add_row(name, ", ".join(recipe.splits), recipe.description)
    plain_console().print(table)


@app.command("build", epilog=_BUILD_EXAMPLES)
def build(
    recipe: Annotated[
        str, typer.Argument(help=f"A shipped recipe ({', '.join(names('shards'))}) or the path of a YAML file.")
    ],
    root: Annotated[Path, typer.Option(help="Folder of the raw data set.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the shards and their manifest.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split of the recipe; needed if it has several.")] = None,
    workers: Workers = None,
    include: _Include = None,
    exclude: _Exclude = None,
    unlabelled: _Unlabelled = False,
    image_format: Annotated[
        Literal["keep", "jpg", "png", "webp"],
        typer.Option(help="Image format in the shards; keep copies JPEG, PNG and WebP files byte for byte."),
    ] = "keep",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of encoded JPEG and WebP images.")] = 90,
    max_edge: Annotated[
        int | None, typer.Option(min=1, help="Shrink images whose longer edge has more pixels than this.")
    ] = None,
    tile: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="HEIGHT WIDTH", help="Cut images into tiles; those without a labelled pixel are left out."
        ),
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Pixels that neighbouring tiles share.")] = 0,
    max_pixels: MaxPixels = None,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Samples in each shard.", show_default="256")
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Split into shards by size instead, for example 512MB. The split is made before anything is encoded, "
            "so it uses the size of the raw images and labels."
        ),
    ] = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="What to do with a damaged or unfit sample: stop the build, or skip and report it."),
    ] = "fail",
    task: Annotated[
        int | None,
        typer.Option(min=0, help="Build only this part, counted from 0; join all parts with dist-pca shards merge."),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Number of parts; several machines may build them at the same time.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be built and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace any shards in --out.")] = False,
) -> None:
    """Build shards from a raw data set.

    Shards are plain WebDataset tars; their bytes do not depend on the number of workers or parts.
    An interrupted build leaves no partial shards, and the same command resumes from the finished ones.
    A finished build is not repeated.
    """
    from dist_pca.shards.build import build_part, build_shards
    from dist_pca.shards.plan import PlanOptions, make_plan, parse_bytes
    from dist_pca.shards.sample import MAX_PIXELS
    from dist_pca.shards.staging import STAGING, read_skipped

    if (task is None) != (tasks is None):
        raise UserError("--task and --tasks must be given together, for example --task 0 --tasks 4")
    options: PlanOptions = {
        "split": split,
        "include": include or (),
        "exclude": exclude or (),
        "unlabelled": unlabelled,
        "image_format": image_format,
        "quality": quality,
        "max_edge": max_edge,
        "tile": tile,
        "overlap": overlap,
        "max_pixels": max_pixels or MAX_PIXELS,
        "samples_per_shard": samples_per_shard,
        "shard_size": None if shard_size is None else parse_bytes(shard_size),
        "on_error": on_error,
    }
    if dry_run:
        from dist_pca.shards.report import plan_tables

        plain_console().print(plan_tables(make_plan(recipe, root, **options), out))
        return
    from dist_pca.shards.progress import shown_progress
    from dist_pca.shards.report import summary_table

    start = time.perf_counter()
    done = 0
    manifest = None
    try:
        with shown_progress("images") as show:

            def count(samples: int, total: int, stored: int) -> None:
                nonlocal done
                done = samples
                show(samples, total, stored)

            if task is not None and tasks is not None:
                part = build_part(
                    recipe, root, out, task=task, tasks=tasks, workers=workers, force=force, progress=count, **options
                )
                samples, shards, stored, skipped = part.samples, part.shards, part.bytes, part.skipped
            else:
                manifest = build_shards(recipe, root, out, workers=workers, force=force, progress=count, **options)
                samples, shards, skipped = manifest.samples, len(manifest.shards), read_skipped(out)
                stored = sum(shard.bytes for shard in manifest.shards)
    except KeyboardInterrupt:
        if (out / STAGING).exists():
            plain_console(stderr=True).print("interrupted; the same command resumes from the finished shards")
        raise
    seconds = time.perf_counter() - start
    nothing_done = "already built" if shards else "nothing to do"
    speed = f"{done / seconds:,.0f}" if done else nothing_done
    title = str(out) if task is None else f"{out}, task {task} of {tasks}"
    _print_skipped(skipped, samples)
    if manifest is not None:
        print_empty_classes(manifest)
    plain_console().print(
        summary_table(title, samples=samples, shards=shards, stored=stored, seconds=seconds, speed=speed)
    )


@app.command("check", epilog=_CHECK_EXAMPLES)
def check(
    root: Annotated[Path, typer.Argument(help="Folder of the raw data set.", show_default=False)],
    recipe: Annotated[str, typer.Option(help="A shipped recipe or the path of a YAML file.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split of the recipe.", show_default="all of them")] = None,
    include: _Include = None,
    exclude: _Exclude = None,
    unlabelled: _Unlabelled = False,
    max_pixels: MaxPixels = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Check a raw data set before building shards from it; the exit code is 1 if a build would refuse a file.

    Shows sizes, formats, value ranges, orientations, label values and what they mean, files that are passed over,
    classes without a pixel, and images of one split that look like one of another. Writes nothing.
    """
    from dist_pca.shards.check import check_raw
    from dist_pca.shards.progress import shown_progress
    from dist_pca.shards.report import check_tables
    from dist_pca.shards.sample import MAX_PIXELS

    with shown_progress("images") as show:
        found = check_raw(
            recipe,
            root,
            split=split,
            include=include or (),
            exclude=exclude or (),
            unlabelled=unlabelled,
            max_pixels=max_pixels or MAX_PIXELS,
            workers=workers,
            progress=show,
        )
    images = sum(part.images for part in found.splits)
    end_check(found, root, f"{images:,} images", check_tables(found), as_json=as_json)


@app.command("merge", epilog=_MERGE_EXAMPLES)
def merge(
    out: Annotated[Path, typer.Argument(help="The --out folder of all parts.", show_default=False)],
) -> None:
    """Join the parts made by [bold]build --task[/] into one shard folder, byte for byte that of a single build."""
    from dist_pca.shards.build import merge_parts
    from dist_pca.shards.staging import read_skipped

    manifest = merge_parts(out)
    _print_skipped(read_skipped(out), manifest.samples)
    print_empty_classes(manifest)
    typer.echo(f"{out}: {counted(manifest.samples, 'sample')} in {counted(len(manifest.shards), 'shard')}")


def _print_skipped(skipped: "Sequence[Skipped]", kept: int) -> None:
    if skipped:
        from dist_pca.shards.report import skipped_table

        plain_console(stderr=True, always=True).print(skipped_table(skipped))
        print_warning(f"{len(skipped):,} of {len(skipped) + kept:,} samples were skipped")
