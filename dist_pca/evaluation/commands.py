"""The commands `dist-pca evaluate`, `predict` and `export`: argument parsing and output."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_pca.console import plain_console, print_warning
from dist_pca.errors import UserError
from dist_pca.options import MaxPixels

app = typer.Typer(rich_markup_mode="rich")

_EVALUATE_EXAMPLES = """
[bold]Examples[/]

dist-pca evaluate runs/gta5_to_cityscapes --shards data/cityscapes_val

dist-pca evaluate runs/synthia_to_cityscapes --shards data/cityscapes_val --label-set synthia_13 --json

dist-pca evaluate runs/mine --shards data/test --flip --scale 0.75 --scale 1 --scale 1.25

dist-pca evaluate runs/mine --shards data/test --input-size 1024 2048 --window 512 1024 --checkpoint 4000

dist-pca evaluate runs/gta5_to_cityscapes --shards data/cityscapes_test --write-predictions results --coding label-ids

dist-pca evaluate runs/mine --shards data/test --write-scores scores --boundary-iou 0.02

accelerate launch --config_file launch/accelerate/cpu.yaml -m dist_pca.cli evaluate runs/camvid --shards data/test
"""

_PREDICT_EXAMPLES = """
[bold]Examples[/]

dist-pca predict runs/mine photo.jpg --out seen

dist-pca predict runs/mine drive/2024 'more/**/*.png' --out seen --no-labels --on-error skip

dist-pca predict runs/fields fields/images --recipe fields.yaml --out seen
"""

_EXPORT_EXAMPLES = """
[bold]Examples[/]

dist-pca export runs/mine --out exported

dist-pca export runs/mine --out exported --onnx --onnx-size 512 1024
"""

_Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
_Checkpoint = Annotated[
    str | None,
    typer.Option(help="Step or name of a checkpoint in the run folder, or best.", show_default="the newest"),
]
_Weights = Annotated[
    Literal["ema", "trained"] | None,
    typer.Option(
        help="Which weights: the moving average (training.ema_decay), or the trained weights.",
        show_default="ema if there is one",
    ),
]
_InputSize = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="HEIGHT WIDTH", help="Input size of images.", show_default="evaluation.input_size of the run"),
]
_Window = Annotated[
    tuple[int, int] | None,
    typer.Option(
        metavar="HEIGHT WIDTH",
        help="Run the network on sliding windows of the resized image; bounds memory.",
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
    typer.Option(help="Share of test-time aggregation of features and probabilities, for example 0.5."),
]
_Coding = Annotated[
    Literal["label-ids", "train-ids", "colors"] | None,
    typer.Option(
        help="What written predictions hold: label ids of Cityscapes, as its server needs them; train ids, as ACDC's "
        "does; or RGB in the classes' colours.",
        show_default="the data set's, or label ids if all classes are in Cityscapes",
    ),
]


@app.command("evaluate", epilog=_EVALUATE_EXAMPLES)
def evaluate(
    run: _Run,
    shards: Annotated[str, typer.Option(help="Folder or URL of labelled shards.", show_default=False)],
    checkpoint: _Checkpoint = None,
    weights: _Weights = None,
    label_set: Annotated[
        list[str] | None, typer.Option(help="Also report the mean IoU of a label set, such as synthia_13. Repeatable.")
    ] = None,
    input_size: _InputSize = None,
    window: _Window = None,
    stride: _Stride = None,
    flip: _Flip = None,
    scale: _Scale = None,
    aggregation: _Aggregation = None,
    class_map: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS=RUN",
            help="Score a class of the shards as this class of the run, if their names differ: "
            "'traffic_light=traffic light'. Repeatable.",
        ),
    ] = None,
    boundary_iou: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Also report boundary IoU (Cheng et al. 2021) of boundaries as wide as this share of the image's "
            "diagonal; the paper takes 0.02.",
        ),
    ] = None,
    write_scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write scores by class and by image and the confusion matrix (CSV, and a picture if matplotlib is "
            "installed) into a new folder.",
        ),
    ] = None,
    write_predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write a PNG of each image's prediction into a new folder, named after the image's source file. "
            "Shards without labels are predicted, and not scored.",
        ),
    ] = None,
    coding: _Coding = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score a run on labelled shards: IoU, precision, recall and F1 of each class, their means, and pixel accuracy.

    Settings are the run's [bold]evaluation[/] keys; options override them.
    Under accelerate launch the images are divided among the ranks, and the scores are the same.
    """
    from dist_pca.data.addresses import redact
    from dist_pca.data.cache import cache_settings, open_manifest
    from dist_pca.data.class_table import describe_missing, missing_classes
    from dist_pca.distributed import join_ranks
    from dist_pca.evaluation import evaluate as evaluation
    from dist_pca.evaluation.load import load_run
    from dist_pca.evaluation.options import parse_class_map, with_options
    from dist_pca.evaluation.prediction_files import prediction_values
    from dist_pca.evaluation.report import table
    from dist_pca.training.environment import watch_ranks

    if coding is not None and write_predictions is None:
        raise UserError("--coding: has no effect without --write-predictions; add it")
    if write_scores is not None and write_predictions is not None:
        first, second = write_scores.resolve(), write_predictions.resolve()
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise UserError(
                f"--write-scores {write_scores}, --write-predictions {write_predictions}: give folders of which none "
                "is in the other"
            )
    config, classes, model = load_run(run, checkpoint, weights=weights)
    manifest = open_manifest(shards, cache_settings(config.data.cache))
    config = with_options(
        config,
        label_sets=label_set,
        input_size=input_size,
        window=window,
        stride=stride,
        flip=flip,
        scales=scale,
        aggregation=aggregation,
        class_map=None if class_map is None else parse_class_map(class_map),
        boundary_iou=boundary_iou,
    )
    values = prediction_values(classes, coding, manifest)
    scored = manifest.labelled or write_predictions is None
    if not scored and write_scores is not None:
        raise UserError(f"--write-scores: the shards {manifest.folder} have no labels; leave the option out")
    missing = missing_classes(manifest, classes, config.evaluation.class_map) if manifest.labelled else {}
    rank, world_size, device = join_ranks()
    for line in describe_missing(manifest, missing) if rank == 0 else ():
        print_warning(line)
    scores = None
    with nullcontext() if world_size == 1 else watch_ranks(rank, world_size, config.training.stall_timeout):
        model.to(device)
        if write_predictions is not None and not scored:
            evaluation.write_predictions(model, manifest, classes, config, write_predictions, values, device=device)
        else:
            scores = evaluation.evaluate(
                model,
                manifest,
                classes,
                config,
                predictions=write_predictions,
                values=values,
                score_folder=write_scores,
                device=device,
            )
    if rank != 0:
        return
    if scores is not None:
        typer.echo(scores.to_json()) if as_json else plain_console().print(table(scores, f"{run} on {redact(shards)}"))
    if write_scores is not None:
        typer.echo(f"{write_scores}: {', '.join(sorted(path.name for path in write_scores.iterdir()))}", err=True)
    if write_predictions is not None:
        typer.echo(
            f"{write_predictions}: {manifest.samples:,} predictions ({values.description})"
            + ("" if scored else "; no scores, as the shards have no labels"),
            err=True,
        )


@app.command("predict", epilog=_PREDICT_EXAMPLES)
def predict(
    run: _Run,
    images: Annotated[list[str], typer.Argument(help="Image files, folders and globs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the results.", show_default=False)],
    checkpoint: _Checkpoint = None,
    weights: _Weights = None,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Write labels/NAME.png: 8-bit train ids with a colour palette.")
    ] = True,
    coding: Annotated[
        Literal["label-ids", "train-ids", "colors"],
        typer.Option(help="What label files hold: Cityscapes label ids, train ids, or RGB in the classes' colours."),
    ] = "train-ids",
    overlays: Annotated[
        bool, typer.Option("--overlay/--no-overlay", help="Write overlays/NAME.png: image and label colours.")
    ] = True,
    shorter_edge: Annotated[
        int | None,
        typer.Option(
            min=1, help="Shorter edge, in pixels, to which images are resized.", show_default="that of the run"
        ),
    ] = None,
    window: _Window = None,
    stride: _Stride = None,
    flip: _Flip = None,
    scale: _Scale = None,
    aggregation: _Aggregation = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="What to do with an unreadable image: stop the command, or skip and report it."),
    ] = "fail",
    value_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range", metavar="LOW HIGH", help="Values that are black and white in images of more than 8 bits."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Read images as this recipe says, a shipped one or a YAML file: its bands, range and clip. Needed for "
            "a network of other than three bands.",
            show_default="as RGB",
        ),
    ] = None,
    max_pixels: MaxPixels = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Predict the labels of images with a trained run, on the GPU if there is one.

    Images may have any size and mode; their aspect ratio is kept, and results have their size.
    Results are named after the images' paths below their common folder; classes.json lists the classes by train id.
    """
    import torch

    from dist_pca.evaluation.image_files import find_images
    from dist_pca.evaluation.load import load_run
    from dist_pca.evaluation.options import with_options
    from dist_pca.evaluation.predict_images import predict_images
    from dist_pca.evaluation.prediction_files import prediction_values
    from dist_pca.files import refuse_existing
    from dist_pca.shards.find import described
    from dist_pca.shards.images import AS_RGB, Reading, ValueRange
    from dist_pca.shards.recipe import load_recipe
    from dist_pca.shards.sample import MAX_PIXELS

    if not labels and not overlays:
        raise UserError("--no-labels --no-overlay: nothing to write; remove one of them")
    if value_range is not None and not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise UserError(f"--range {value_range[0]:g} {value_range[1]:g}: give two numbers, the lower one first")
    if value_range is not None and recipe is not None:
        raise UserError("--range: the recipe of --recipe has a range of its own; leave one of them out")
    if not force:
        refuse_existing(out, "--out")
    if recipe is not None:
        reading = load_recipe(recipe).reading
    else:
        reading = AS_RGB if value_range is None else Reading((ValueRange(*value_range),))
    found = find_images(images, out, reading.suffixes)
    config, classes, model = load_run(run, checkpoint, weights=weights)
    bands = model.backbone.options.bands
    if reading.count != bands:
        how = "without a recipe images are read as RGB" if recipe is None else f"{recipe} keeps {reading.count}"
        raise UserError(f"--recipe: the network of {run} takes {bands} bands, and {how}; name the recipe of its shards")
    values = prediction_values(classes, coding)
    config = with_options(
        config,
        input_size=None if shorter_edge is None else (shorter_edge, shorter_edge),
        window=window,
        stride=stride,
        flip=flip,
        scales=scale,
        aggregation=aggregation,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = plain_console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images, left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(found.images))
        done = predict_images(
            model.to(device),
            found.images,
            out,
            classes,
            config,
            device=device,
            values=None if coding == "train-ids" else values,
            labels=labels,
            overlays=overlays,
            on_error=on_error,
            reading=reading,
            max_pixels=max_pixels or MAX_PIXELS,
            progress=lambda count: bar.update(task, completed=count),
        )
    if found.passed_over:
        print_warning(f"passed over {described(found.passed_over)}")
    for line in done.skipped:
        print_warning(f"skipped {line}")
    written = ((f"labels ({values.description})", labels), ("overlays", overlays))
    kinds = " and ".join(kind for kind, wanted in written if wanted)
    skipped = f", {len(done.skipped):,} skipped" if done.skipped else ""
    typer.echo(f"{out}: {kinds} of {done.written:,} image{'s' * (done.written != 1)}{skipped}")


@app.command("export", epilog=_EXPORT_EXAMPLES)
def export(
    run: _Run,
    out: Annotated[Path, typer.Option(help="Folder to create.", show_default=False)],
    checkpoint: _Checkpoint = None,
    weights: _Weights = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Add model.onnx: uint8 images in, logits of the same size out.")
    ] = False,
    onnx_size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="HEIGHT WIDTH",
            help="Fixed input size of model.onnx; the export takes seconds, and for any size it may take minutes.",
            show_default="any size",
        ),
    ] = None,
) -> None:
    """Export a run's network: model.safetensors, config.json, classes.json.

    [bold]dist_pca.model.exported.load_exported[/] loads them without config, trainer or DeepSpeed.
    An ONNX file is run and compared with PyTorch before the folder is created.
    """
    from dist_pca.evaluation.export import export as write
    from dist_pca.evaluation.load import load_run
    from dist_pca.evaluation.onnx_file import require_onnx

    if onnx_size is not None and not onnx:
        raise UserError("--onnx-size: has no effect without --onnx; add it")
    if onnx_size is not None and min(onnx_size) < 1:
        raise UserError(f"--onnx-size {onnx_size[0]} {onnx_size[1]}: give a height and a width of 1 pixel or more")
    if onnx:
        require_onnx()
    config, classes, model = load_run(run, checkpoint, weights=weights)
    doing = "exporting; for images of any size it takes minutes" if onnx and onnx_size is None else "exporting"
    # Bind the console to the file now, because stderr is redirected during PyTorch's export.
    with plain_console(file=sys.stderr).status(doing):
        difference = write(model, config, classes, out, onnx=onnx, onnx_size=onnx_size)
    typer.echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if difference is not None:
        typer.echo(f"model.onnx differs from PyTorch by at most {difference:.1e} of the largest logit")
