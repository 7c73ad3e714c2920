"""`dist-pca matches`: parsing and printing."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import track

from dist_pca.console import plain_console

app = typer.Typer(rich_markup_mode="rich")

_MATCHES_EXAMPLES = """
[bold]Examples[/]

dist-pca matches runs/mine --target data/cityscapes_train_labelled --out matches

dist-pca matches runs/mine --all-checkpoints --level predictions --batches 8 --json

dist-pca matches runs/mine --checkpoint 1000 --checkpoint best --scope pair --diffusion 0 --no-teacher

dist-pca matches runs/mine --target data/cityscapes_val --whole-frames --batches 2 --images 2 --out matches_val
"""


@app.command("matches", epilog=_MATCHES_EXAMPLES)
def matches(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    source: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="Labelled source shards.", show_default="the run's data.source")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS",
            help="Labelled target shards; the labels judge matches and never make them.",
            show_default="the run's data.target",
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="The step, or name, of a checkpoint in the run folder, or best. Repeatable.", show_default="the newest"
        ),
    ] = None,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="All checkpoints, so that matches are seen over training.")
    ] = False,
    level: Annotated[
        Literal["features", "predictions"] | None,
        typer.Option(help="What is compared.", show_default="objective.association.levels of the run"),
    ] = None,
    scope: Annotated[
        Literal["pair", "world"] | None,
        typer.Option(
            help="Candidates: the k-th source with the k-th target image, or all images of a batch together.",
            show_default="pair if the run's is, else world",
        ),
    ] = None,
    diffusion: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of a target pixel that diffusion replaces.", show_default="that of the run"
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches looked at.")] = 4,
    images: Annotated[int, typer.Option(min=1, help="Images of each domain in a batch.")] = 4,
    whole_frames: Annotated[
        bool, typer.Option("--whole-frames/--crops", help="Whole frames instead of the crops that training takes.")
    ] = False,
    teacher: Annotated[
        bool | None,
        typer.Option(
            "--teacher/--no-teacher",
            help="Let the moving average check, weight and choose cycles as objective.association.teacher_* say.",
            show_default="as the run",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="New folder for matches.csv and pictures.", show_default="none is written"),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Most pictures of each level and checkpoint.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which pixels association matches, which matches are wrong, and which classes these pull where.

    The network is run on labelled crops of both domains, and source pixels are matched to target pixels and back as in
    training; the target's true labels show which matches are correct. Needs no GPU.

    For each source class the table has its matches, the kept ones (consistent, and seen alike by the teacher where the
    run asks one), the share of each that is correct, the wrong class that kept cycles meet most, and the class's share
    of the association loss. [bold]Hubs[/] are the most matched 1 per cent of target pixels: much in few of them means
    that many pixels are pulled towards the same few. Where pixels at the edges of crops receive far more than their
    share, a network's padding is matched rather than what the image shows.

    Several checkpoints have a table of their own at the end, one row for each: what is right, what share of the loss
    wrong matches carry, and the true class that is pulled most towards another.

    --out gets matches.csv, with a row for each pair of source class and true class, and matches-LEVEL-N.png, where a
    sample of matches is drawn as lines, green where right and red where wrong. Several checkpoints have a folder of
    pictures each.

    The network is in evaluation mode, and all pixels take part, whatever objective.association.pixel_budget.
    """
    import torch

    from dist_pca.files import new_folder, refuse_existing
    from dist_pca.tools.matches.crops import open_domains, take_batches
    from dist_pca.tools.matches.judge import summarise
    from dist_pca.tools.matches.measure import find_checkpoints, measure, with_options
    from dist_pca.tools.matches.picture import save_pictures
    from dist_pca.tools.matches.report import Block, lines, overview, table, to_json, write_csv
    from dist_pca.training.run_folder import read_run

    if out is not None:
        refuse_existing(out, "--out")
    config, classes = read_run(run)
    found = find_checkpoints(run, checkpoint or (), all_checkpoints=all_checkpoints)
    config = with_options(config, source=source, target=target, scope=scope, diffusion=diffusion, teacher=teacher)
    taken = take_batches(
        config, *open_domains(config.data, classes), batches=batches, images=images, whole=whole_frames
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    association, blocks = config.objective.association, []
    console = plain_console(stderr=True, soft_wrap=True)
    with nullcontext() if out is None else new_folder(out, "--out") as staged:
        for name in track(found, "matching", console=console, transient=True, disable=not console.is_terminal):
            for of_level, judged in measure(run, name, config, taken, level=level, device=device).items():
                block = Block(name, of_level, association.scope, summarise(judged, len(classes)))
                blocks.append(block)
                if staged is not None:
                    folder = staged / name if len(found) > 1 else staged
                    save_pictures(folder, f"{name}, {of_level}", of_level, taken, judged, classes, most=pictures)
        if staged is not None:
            write_csv(staged / "matches.csv", blocks, classes)
    if as_json:
        typer.echo(to_json(blocks, classes, batches * images))
        return
    for block in blocks:
        plain_console().print(table(block, classes))
        for line in lines(block, classes):
            typer.echo(line)
        typer.echo()
    if len(found) > 1:
        plain_console().print(overview(blocks, classes))
