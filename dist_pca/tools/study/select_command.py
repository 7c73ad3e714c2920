"""`dist-pca select`: parsing and printing."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_pca.console import paths_in_common, plain_console
from dist_pca.data.addresses import redact
from dist_pca.errors import UserError

if TYPE_CHECKING:
    from dist_pca.shards.manifest import Manifest
    from dist_pca.tools.study.selection import Candidate, Measurement

app = typer.Typer(rich_markup_mode="rich")

_SELECT_EXAMPLES = """
[bold]Examples[/]

dist-pca select studies/camvid/runs/* --target data/camvid/target

dist-pca select runs/a runs/b runs/c --target data/cityscapes_train --source-validation data/gta5_val --max-images 200

dist-pca select runs/mine --all-checkpoints --target data/cityscapes_train --rule agreement --json
"""


@app.command("select", epilog=_SELECT_EXAMPLES)
def select(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of trained runs of the same classes.", show_default=False)
    ],
    target: Annotated[
        str, typer.Option(metavar="SHARDS", help="Shards of the target; no labels are needed.", show_default=False)
    ],
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Choose among all checkpoints of each run, not the newest alone.")
    ] = False,
    rule: Annotated[
        Literal["information", "agreement"],
        typer.Option(help="What the chosen one has most of: decided pixels of many classes, or the others' votes."),
    ] = "information",
    source_validation: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Labelled source shards: keep out what forgot the source."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Points of source mIoU that a candidate may be below the best one.")
    ] = 2.0,
    max_images: Annotated[
        int | None,
        typer.Option(min=1, help="Target images looked at, evenly spread over the shards.", show_default="all"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Choose among runs or checkpoints without labels of the target.

    Two scores are measured on the target's images. [bold]information[/] is high where each pixel is decided and the
    classes are many: the entropy of the mean prediction less the mean entropy of predictions (information maximisation,
    ICML 2012). [bold]agreement[/] is how often a candidate predicts what the average of all does (EnsV, NeurIPS 2024);
    as a rule it takes three candidates or more, and of candidates that differ much it takes the one in the middle. The
    rule information takes the largest product of the two, and of two candidates the larger information.

    Two guards exclude candidates from the choice, and by the rule agreement, where three or more are left, from the
    average too. One excludes those whose mIoU on [bold]--source-validation[/] is more than [bold]--tolerance[/] points
    below the best. The other excludes those that have collapsed: they predict at most half as many classes as the
    ensemble or the median candidate (a class counts from 0.1 per cent of the pixels on), their predicted classes have
    at most half of that one's entropy, or they no longer predict a class that the median candidate sees on 1 per cent
    of the pixels.

    Labels of the target, if there are any, are never used to choose, only to rate the choice afterwards. The
    last line is the chosen run, as [bold]dist-pca evaluate[/] takes it.
    """
    import torch

    from dist_pca.config import load_config
    from dist_pca.data.cache import cache_settings, open_manifest
    from dist_pca.tools.study.scoring import score_checkpoint
    from dist_pca.tools.study.selection import (
        MAJORITY,
        choose,
        find_candidates,
        guard,
        histogram_entropy,
        measure,
        predicted_classes,
        spread,
    )

    candidates = find_candidates(runs, all_checkpoints=all_checkpoints)
    if rule == "agreement" and len(candidates) < MAJORITY:
        raise UserError("--rule agreement: two candidates have no majority; use --rule information, or name more runs")
    cache = cache_settings(load_config(candidates[0].run / "config.yaml").data.cache)
    images = spread(open_manifest(target, cache), max_images)
    source = None if source_validation is None else open_manifest(source_validation, cache)
    console = plain_console(stderr=True, soft_wrap=True)
    on_source = source and [score_checkpoint(run, source, checkpoint).mean_iou for run, checkpoint in candidates]
    columns = (TextColumn("comparing"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def measured(compared: "Sequence[Candidate]") -> "Measurement":
            bar.reset(task, total=len(compared) * images.samples)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return measure(compared, images, device=device, progress=lambda done: bar.update(task, completed=done))

        measurement = measured(candidates)
        reasons = guard(measurement, on_source or None, tolerance=tolerance / 100)
        left = [place for place, out in enumerate(reasons) if not out]
        if MAJORITY <= len(left) < len(candidates):
            # What is kept out has no vote in the ensemble either.
            again = measured([candidates[place] for place in left])
            for place, alone in zip(left, again.candidates, strict=True):
                measurement.candidates[place] = alone
    chosen = choose(measurement, reasons, rule)
    true = _true_mean_iou(candidates, images)
    rows: list[dict[str, Any]] = [
        {
            "run": str(candidate.run),
            "step": candidate.step,
            "information": measured.information,
            "agreement": measured.agreement,
            "classes": predicted_classes(measured.histogram),
            "entropy": histogram_entropy(measured.histogram),
            "source_mean_iou": on_source[place] if on_source else None,
            "true_mean_iou": true[place] if true else None,
            "out": reasons[place],
        }
        for place, (candidate, measured) in enumerate(zip(candidates, measurement.candidates, strict=True))
    ]
    regret = max(true) - true[chosen] if true else None
    if as_json:
        found = {"rule": rule, "images": images.samples, "chosen": rows[chosen], "regret": regret}
        typer.echo(json.dumps({**found, "candidates": rows}, indent=2))
        return
    _print_table(rows, chosen, f"by {rule} on {images.samples:,} images of {redact(target)}")
    if regret is not None:
        console.print(f"true mIoU is {100 * regret:.1f} points below the best candidate's", markup=False)
    run, checkpoint = candidates[chosen]
    typer.echo(f"{run} --checkpoint {checkpoint.name}" if all_checkpoints else f"{run}")


def _true_mean_iou(candidates: "Sequence[Candidate]", images: "Manifest") -> list[float]:
    """Mean IoU of each candidate by the target's labels; empty where it has none of the classes."""
    from dist_pca.tools.study.scoring import score_checkpoint
    from dist_pca.training.run_folder import read_classes

    names = {info.name for info in images.classes} & {info.name for info in read_classes(candidates[0].run)}
    if not images.labelled or not names:
        return []
    return [score_checkpoint(run, images, checkpoint).mean_iou for run, checkpoint in candidates]


def _print_table(rows: Sequence[dict[str, Any]], chosen: int, title: str) -> None:
    from dist_pca.tools.bench.report import rich_table

    def percent(value: float | None) -> str:
        return f"{100 * value:.1f}" if value is not None and not math.isnan(value) else ""

    shown = [
        {
            "candidate": f"{'> ' if place == chosen else '  '}{run} step {row['step']}",
            "information": f"{row['information']:.3f}",
            "agreement": percent(row["agreement"]),
            "classes": str(row["classes"]),
            "entropy": f"{row['entropy']:.2f}",
            "source mIoU": percent(row["source_mean_iou"]),
            "true mIoU": percent(row["true_mean_iou"]),
            "out": "; ".join(row["out"]),
        }
        for place, (row, run) in enumerate(zip(rows, paths_in_common([row["run"] for row in rows]), strict=True))
    ]
    plain_console().print(rich_table(title, shown))
