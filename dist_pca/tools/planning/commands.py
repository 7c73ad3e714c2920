"""`dist-pca plan`: parsing and printing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_pca.console import plain_console
from dist_pca.resources import names

if TYPE_CHECKING:
    from dist_pca.config import RunConfig

app = typer.Typer(rich_markup_mode="rich")

_EXAMPLES = """
[bold]Examples[/]

dist-pca plan gta5_to_cityscapes --nodes 1 --gpus-per-node 8

dist-pca plan gta5_to_cityscapes training.source_batch=16 training.target_batch=16 --nodes 2 --gpu a100

dist-pca plan my_run.yaml --sweep 1024 --plot plan.png

dist-pca plan my_run.yaml --gpu h100 --memory 94 --network 25 --efficiency 0.35 --json
"""

_FIGURES = "The GPU's figures, where they differ from the vendor's"
_ASSUMED = "Assumptions: measure a few steps and put in your own"


@app.command("plan", epilog=_EXAMPLES)
def plan(
    config: Annotated[
        str, typer.Argument(help=f"A YAML file, or one that comes with dist-pca: {', '.join(names('configs'))}.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.steps=100")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpu: Annotated[
        str,
        typer.Option(
            help="a10, a100, a100-40, b200, h100, h200, l4, l40s, rtx4090, v100; or cpu for this machine's processor."
        ),
    ] = "h100",
    classes: Annotated[
        int | None,
        typer.Option(min=2, help="Number of classes.", show_default="data.classes, else the shards', else 19"),
    ] = None,
    sweep: Annotated[
        int | None, typer.Option(min=1, help="Also 1, 2, 4, ... up to so many GPUs, with as many images on each.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the sweep (to 1,024 GPUs by itself): PNG, PDF or SVG.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GB.", rich_help_panel=_FIGURES)] = None,
    bf16: Annotated[float | None, typer.Option(min=0, help="Dense TFLOP/s of bf16.", rich_help_panel=_FIGURES)] = None,
    tf32: Annotated[
        float | None,
        typer.Option(min=0, help="Dense TFLOP/s of TF32, which fp32 convolutions use.", rich_help_panel=_FIGURES),
    ] = None,
    fp32: Annotated[
        float | None, typer.Option(min=0, help="TFLOP/s of fp32, which fp32 products use.", rich_help_panel=_FIGURES)
    ] = None,
    link: Annotated[
        float | None, typer.Option(min=0, help="GB/s between a node's GPUs, one way.", rich_help_panel=_FIGURES)
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0, help="GB/s to other nodes for each GPU, one way.", rich_help_panel=_FIGURES)
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="Share of the rate that the network reaches [0.4].", rich_help_panel=_ASSUMED
        ),
    ] = None,
    association_efficiency: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="Share of the rate that the association reaches [0.5].", rich_help_panel=_ASSUMED
        ),
    ] = None,
    link_efficiency: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="Share of the links' rate that collectives reach [0.75].", rich_help_panel=_ASSUMED
        ),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Microseconds of the smallest collective in a node [20]; three times that between nodes.",
            rich_help_panel=_ASSUMED,
        ),
    ] = None,
    matched: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of targets that are matched, cover_ratio [0.22].", rich_help_panel=_ASSUMED
        ),
    ] = None,
    kept: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of source pixels whose cycle is kept [0.72].", rich_help_panel=_ASSUMED),
    ] = None,
    loader_rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Images per second of one loader process [30].", rich_help_panel=_ASSUMED),
    ] = None,
    reserve: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.99,
            help="Share of memory for what is no tensor: CUDA, NCCL, cuDNN, gaps [0.1].",
            rich_help_panel=_ASSUMED,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Predict memory, communication, operations and time of a run, before any machine is asked for it.

    Nothing is trained and no data is read: the config is enough. Every operation of the network goes past with shapes
    and no values, so activations, autocast and operations are those of the real one; the rest is counted from the
    buffers and collectives that DeepSpeed and the association use. Memory and bytes are held to measured runs by tests
    (within 15 %). Times are estimates from data sheets and the assumptions below, which no run on GPUs has checked:
    compare them with each other, and put in what a few measured steps reached before you budget by them.
    """
    from dist_pca.tools.planning import report
    from dist_pca.tools.planning.advice import as_overrides, best_choice
    from dist_pca.tools.planning.candidates import candidate_costs
    from dist_pca.tools.planning.hardware import Assumptions, Cluster, find_gpu
    from dist_pca.tools.planning.network import DEFAULT_CLASSES, run_network
    from dist_pca.tools.planning.predict import images_per_rank, predict
    from dist_pca.tools.planning.predict import sweep as predict_sweep
    from dist_pca.train import resolve_config
    from dist_pca.training.accumulation import fit_accumulation

    if plot is not None:
        from dist_pca.tools.bench.picture import require_matplotlib

        require_matplotlib()
    run = resolve_config(config, overrides or [])
    figures = {"memory": (memory, 1e9), "bf16": (bf16, 1e12), "tf32": (tf32, 1e12), "fp32": (fp32, 1e12)}
    figures |= {"link": (link, 1e9), "network": (network, 1e9)}
    given: dict[str, Any] = {name: value * unit for name, (value, unit) in figures.items() if value is not None}
    cluster = Cluster(replace(find_gpu(gpu), **given), nodes, gpus_per_node)
    assumed = {
        "network_efficiency": efficiency,
        "association_efficiency": association_efficiency,
        "link_efficiency": link_efficiency,
        "latency": None if latency is None else latency * 1e-6,
        "matched": matched,
        "kept": kept,
        "loader_rate": loader_rate,
        "reserve": reserve,
    }
    assumptions = Assumptions(**{name: value for name, value in assumed.items() if value is not None})
    run = fit_accumulation(run, cluster.size)
    images = images_per_rank(run, cluster.size)
    count = classes or _classes(run)
    stage = run.training.zero_stage or 2
    messages = plain_console(stderr=True, soft_wrap=True)
    with messages.status("passing every operation of a step by, without values"):
        step = run_network(run, count or DEFAULT_CLASSES, *images)
    prediction = predict(run, step, cluster, assumptions, images=images, stage=stage, steps=run.training.steps)
    best = best_choice(run, step, cluster, assumptions, images=images)
    costs = candidate_costs(run, step, cluster, assumptions, images=images)
    largest = sweep or (1024 if plot is not None else 0)
    swept = predict_sweep(run, step, cluster, assumptions, images=images, stage=stage, largest=largest)
    if plot is not None:
        from dist_pca.tools.planning.picture import draw

        draw(swept, report.headline(*swept), plot)
    if as_json:
        result = prediction.as_dict() | {
            "recommended": None if best is None else {"overrides": as_overrides(best)} | best.as_dict(),
            "candidates": [cost._asdict() for cost in costs],
            "sweep": [other.as_dict() for other in swept],
        }
        typer.echo(json.dumps(result, indent=2))
        return
    printer = plain_console()
    printer.print(report.headline(prediction), "", sep="\n", markup=False)
    for table in (report.memory_table, report.traffic_table, report.time_table):
        printer.print(table(prediction), "", sep="\n")
    if costs:
        printer.print(report.candidates_table(costs), report.CANDIDATES, "", sep="\n")
    if swept:
        printer.print(report.sweep_table(swept), "", sep="\n")
    printer.print(report.advice(prediction, best), markup=False)
    printer.print(report.MEANING, style="dim", markup=False)
    if run.training.grad_cache:
        printer.print(report.GRAD_CACHE, style="yellow", markup=False)
    if count is None:
        printer.print(f"Classes: {DEFAULT_CLASSES}, as there are no shards to read them from; set it with --classes.")


def _classes(run: "RunConfig") -> int | None:
    """Classes that the config names, or that its shards have if they are in folders here."""
    from dist_pca.data.class_table import class_table
    from dist_pca.shards.manifest import load_manifest
    from dist_pca.tools.planning.network import class_count

    named = class_count(run)
    folders = [Path(folder) for folder in run.data.folders("source")]
    if named is not None or not all((folder / "manifest.json").is_file() for folder in folders):
        return named
    return len(class_table(run.data, [load_manifest(folder, check_files=False) for folder in folders], []))
