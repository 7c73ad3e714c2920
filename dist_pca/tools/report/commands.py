"""`dist-pca report`: parsing and printing."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich")

_EXAMPLES = """
[bold]Examples[/]

dist-pca report runs/mine

dist-pca report runs/mine --baseline runs/source_only --target data/cityscapes_val --out mine.html

dist-pca report runs/sgd runs/adamw runs/convnext --pictures 0
"""


@app.command("report", epilog=_EXAMPLES)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, shown side by side.", show_default=False)],
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run folder that the others are compared with.", show_default="none"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS",
            help="Target shards. With labels, the newest checkpoint of each run is scored on all of their images.",
            show_default="data.validation, or else data.target, for pictures alone",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path("report.html"),
    pictures: Annotated[
        int, typer.Option(min=0, help="Target images shown; 0 runs no network and shows no cycles either.")
    ] = 6,
) -> None:
    """Write one HTML file that shows what runs did: result, classes, images, cycles, curves, time and settings.

    The file needs no network and no other file. Training writes the same report into the run folder when it ends,
    without the parts for which a network has to be run: images with predictions and errors before and after
    adaptation, the confusion matrix, and cycles drawn between the crops of a batch.

    What cannot be shown, because a file or shards are missing, is named at the end of the report.
    """
    from dist_pca.console import plain_console
    from dist_pca.tools.report.build import build_report

    built = build_report(runs, baseline, target, out, pictures=pictures)
    plain_console(soft_wrap=True).print(built)
