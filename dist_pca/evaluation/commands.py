"""`dist-pca evaluate`, `predict` and `export`: parsing and printing."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_pca.errors import UserError

if TYPE_CHECKING:
    from dist_pca.config import RunConfig

app = typer.Typer(rich_markup_mode="rich")

_EVALUATE_EXAMPLES = """
[bold]Examples[/]

dist-pca evaluate runs/gta5_to_cityscapes --shards data/city_val

dist-pca evaluate runs/synthia_to_cityscapes --shards data/city_val --label-set synthia_13 --json

dist-pca evaluate runs/mine --shards data/test --flip --scale 0.75 --scale 1 --scale 1.25

dist-pca evaluate runs/mine --shards data/test --input-size 1024 2048 --window 512 1024 --checkpoint 4000

dist-pca evaluate runs/gta5_to_cityscapes --shards data/city_val --write-predictions results

accelerate launch --config_file launch/accelerate/cpu.yaml -m dist_pca.cli evaluate runs/camvid --shards data/test
"""

_PREDICT_EXAMPLES = """
[bold]Examples[/]

dist-pca predict runs/mine photo.jpg --out seen

dist-pca predict runs/mine drive/2024 'more/**/*.png' --out seen --no-labels --on-error skip
"""

_EXPORT_EXAMPLES = """
[bold]Examples[/]

dist-pca export runs/mine --out exported

dist-pca export runs/mine --out exported --onnx --onnx-size 512 1024
"""

_Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
_Checkpoint = Annotated[
    str | None,
    typer.Option(help="The step, or name, of a checkpoint in the run folder, or best.", show_default="the newest"),
]
_Weights = Annotated[
    Literal["ema", "trained"] | None,
    typer.Option(
        help="The moving average that training.ema_decay kept, or the weights as trained.",
        show_default="ema where there is one",
    ),
]
_InputSize = Annotated[
    tuple[int, int] | None,
    typer.Option(
        metavar="HEIGHT WIDTH", help="Size that images are resized to.", show_default="evaluation.input_size of the run"
    ),
]
_Window = Annotated[
    tuple[int, int] | None,
    typer.Option(
        metavar="HEIGHT WIDTH",
        help="Show the network windows of the resized image, one at a time; bounds memory.",
        show_default="that of the run, or the whole image",
    ),
]
_Stride = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="DOWN ACROSS", help="Pixels between windows.", show_default="two thirds of the window"),
]
_Flip = Annotated[
    bool | None, typer.Option("--flip/--no-flip", help="Average with the mirrored image.", show_default="as the run")
]
_Scale = Annotated[
    list[float] | None,
    typer.Option(help="Average over this factor of the input size. Repeatable.", show_default="those of the run"),
]
_Aggregation = Annotated[
    float | None,
    typer.Option(help="Share of features and probabilities mixed with their image's similar ones, for example 0.5."),
]


@app.command("evaluate", epilog=_EVALUATE_EXAMPLES)
def evaluate(
    run: _Run,
    shards: Annotated[str, typer.Option(help="Folder or URL of labelled shards.", show_default=False)],
    checkpoint: _Checkpoint = None,
    weights: _Weights = None,
    label_set: Annotated[
        list[str] | None, typer.Option(help="Also the mean IoU of a named set, for example synthia_13. Repeatable.")
    ] = None,
    input_size: _InputSize = None,
    window: _Window = None,
    stride: _Stride = None,
    flip: _Flip = None,
    scale: _Scale = None,
    aggregation: _Aggregation = None,
    write_predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write a PNG of each image's predicted labels into a new folder: Cityscapes' label ids, as its "
            "evaluation server takes them, or train ids if a class of the run is not one of Cityscapes'.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score a run on labelled shards: IoU of each class, mean IoU and pixel accuracy.

    The run's [bold]evaluation[/] keys say how; options take their place.
    Under accelerate launch all ranks share the images out, and the scores are the same.
    """
    from dist_pca.data.cache import cache_settings, open_manifest
    from dist_pca.evaluation.evaluate import evaluate as score
    from dist_pca.evaluation.label_files import cityscapes_ids
    from dist_pca.evaluation.report import table
    from dist_pca.training.distributed import join_ranks
    from dist_pca.training.run import load_run

    config, classes, model = load_run(run, checkpoint, weights=weights)
    manifest = open_manifest(shards, cache_settings(config.data.cache))
    config = _with_options(
        config,
        label_sets=label_set,
        input_size=input_size,
        window=window,
        stride=stride,
        flip=flip,
        scales=scale,
        aggregation=aggregation,
    )
    rank, world_size, device = join_ranks()
    scores = score(
        model.to(device),
        manifest,
        classes,
        config,
        device=device,
        rank=rank,
        world_size=world_size,
        predictions=write_predictions,
    )
    if rank != 0:
        return
    typer.echo(scores.to_json()) if as_json else Console().print(table(scores, f"{run} on {shards}"))
    if write_predictions is not None:
        coding = (
            "train ids, as not all classes are of Cityscapes" if cityscapes_ids(classes) is None else "Cityscapes ids"
        )
        typer.echo(f"{write_predictions}: {scores.images:,} predictions ({coding})", err=True)


@app.command("predict", epilog=_PREDICT_EXAMPLES)
def predict(
    run: _Run,
    images: Annotated[list[str], typer.Argument(help="Image files, folders and globs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the results.", show_default=False)],
    checkpoint: _Checkpoint = None,
    weights: _Weights = None,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Write labels/NAME.png: 8-bit train ids, shown in colours.")
    ] = True,
    overlays: Annotated[
        bool, typer.Option("--overlay/--no-overlay", help="Write overlays/NAME.png: the image under its colours.")
    ] = True,
    shorter_edge: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels of the shorter edge that images are resized to.", show_default="that of the run"
        ),
    ] = None,
    window: _Window = None,
    stride: _Stride = None,
    flip: _Flip = None,
    scale: _Scale = None,
    aggregation: _Aggregation = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="What an unreadable image does: end the command, or be left out and named."),
    ] = "fail",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Label images with a trained run, on the GPU if there is one.

    Images may have any size and mode; they keep their proportions, and results have their size.
    Results are called as the images' paths below the folder that all share; classes.json says what the train ids mean.
    """
    import torch

    from dist_pca.evaluation.image_files import find_images
    from dist_pca.evaluation.predict_images import predict_images
    from dist_pca.evaluation.staged import refuse_what_is_there
    from dist_pca.training.run import load_run

    if not labels and not overlays:
        raise UserError("--no-labels --no-overlay: nothing is left to write; drop one of them")
    if not force:
        refuse_what_is_there(out, "--out")
    files = find_images(images, out)
    config, classes, model = load_run(run, checkpoint, weights=weights)
    config = _with_options(
        config,
        input_size=None if shorter_edge is None else (shorter_edge, shorter_edge),
        window=window,
        stride=stride,
        flip=flip,
        scales=scale,
        aggregation=aggregation,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images, left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(files))
        done = predict_images(
            model.to(device),
            files,
            out,
            classes,
            config,
            device=device,
            labels=labels,
            overlays=overlays,
            on_error=on_error,
            progress=lambda count: bar.update(task, completed=count),
        )
    for line in done.skipped:
        console.print(f"skipped {line}", style="yellow", markup=False)
    kinds = " and ".join(kind for kind, wanted in (("labels", labels), ("overlays", overlays)) if wanted)
    skipped = f", {len(done.skipped):,} skipped" if done.skipped else ""
    typer.echo(f"{out}: {kinds} of {done.written:,} image{'s' * (done.written != 1)}{skipped}")


@app.command("export", epilog=_EXPORT_EXAMPLES)
def export(
    run: _Run,
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    checkpoint: _Checkpoint = None,
    weights: _Weights = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Add model.onnx: uint8 RGB images in, logits of the same size out.")
    ] = False,
    onnx_size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="HEIGHT WIDTH",
            help="The one size that model.onnx takes: ready in seconds, where any size may take minutes.",
            show_default="any size",
        ),
    ] = None,
) -> None:
    """Write a run's network without the run: model.safetensors, config.json, classes.json.

    [bold]dist_pca.model.exported.load_exported[/] reads them without config, trainer or DeepSpeed.
    An ONNX file is run and compared with PyTorch before the folder appears.
    """
    from dist_pca.evaluation.export import export as write
    from dist_pca.evaluation.onnx_file import require_onnx
    from dist_pca.training.run import load_run

    if onnx_size is not None and not onnx:
        raise UserError("--onnx-size: there is no ONNX file without --onnx; add it")
    if onnx_size is not None and min(onnx_size) < 1:
        raise UserError(f"--onnx-size {onnx_size[0]} {onnx_size[1]}: give a height and a width of 1 pixel or more")
    if onnx:
        require_onnx()
    config, classes, model = load_run(run, checkpoint, weights=weights)
    # Bound to the file, as stderr is taken from PyTorch's exporter for a while.
    with Console(file=sys.stderr).status("exporting"):
        difference = write(model, config, classes, out, onnx=onnx, onnx_size=onnx_size)
    typer.echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if difference is not None:
        typer.echo(f"model.onnx differs from PyTorch by at most {difference:.1e} of the largest logit")


def _with_options(config: "RunConfig", **options: Any) -> "RunConfig":
    """The run with evaluation keys that options have set, checked as those of a file are."""
    from pydantic import ValidationError

    from dist_pca.config import EvaluationConfig

    chosen = {key: value for key, value in options.items() if value is not None}
    # A stride belongs to the window that it was written with.
    own = config.evaluation.model_dump(exclude={"stride"} if "window" in chosen else None)
    try:
        evaluation = EvaluationConfig.model_validate(own | chosen)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        key = f"{first['loc'][0]}: " if first["loc"] else ""
        raise UserError(f"evaluation.{key}{message}; options give {chosen}") from None
    return config.model_copy(update={"evaluation": evaluation})
