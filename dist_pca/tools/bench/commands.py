"""`dist-pca bench`: parsing and printing."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dist_pca.console import plain_console
from dist_pca.errors import UserError

if TYPE_CHECKING:
    from dist_pca.tools.bench.report import Record

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure what the README claims, on this machine.",
)


def _examples(*commands: str) -> str:
    """Write the end of a command's help, with lines to type."""
    return "\n\n".join(("[bold]Examples[/]", *commands))


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


# Enums, because Typer takes no lists of Literals.
class _Dtype(str, Enum):
    FP32 = "fp32"
    BF16 = "bf16"


class _Communication(str, Enum):
    GATHER = "gather"
    RING = "ring"


class _Implementation(str, Enum):
    DENSE = "dense"
    BLOCKWISE = "blockwise"
    TRITON = "triton"
    MATMUL = "matmul"


class _Measurement(str, Enum):
    READING = "reading"
    BUILDING = "building"
    SEEKING = "seeking"
    MEMORY = "memory"
    TRAINING = "training"


@app.callback()
def _root() -> None:
    pass


@app.command(
    "association",
    epilog=_examples(
        "dist-pca bench association",
        "dist-pca bench association --n 2048 --implementation dense --implementation blockwise --json",
        "dist-pca bench association --sweep 1024,2048,4096,16384,65536 --plot association.png",
        "dist-pca bench association --world 2 --n 4096 --communication gather --communication ring --dtype fp32",
        "dist-pca bench association --save results.csv && dist-pca bench table results.csv",
    ),
)
def association(
    n: Annotated[int, typer.Option("--n", min=1, help="Pixels of each domain, on each rank. 8464 is 92 x 92.")] = (
        8464
    ),
    channels: Annotated[int, typer.Option(min=1, help="Length of a feature; for kl, of a probability vector.")] = 256,
    dtype: Annotated[
        list[_Dtype] | None,
        typer.Option(help="What products are computed in; dense is fp32 always. Repeatable.", show_default="both"),
    ] = None,
    world: Annotated[
        int,
        typer.Option(
            min=1, help="Ranks of this machine that associate together: one on each GPU, or sharing its cores."
        ),
    ] = 1,
    communication: Annotated[
        list[_Communication] | None,
        typer.Option(help="How ranks get each other's pixels. Repeatable.", show_default="both"),
    ] = None,
    exchange: Annotated[list[_Communication] | None, typer.Option(hidden=True)] = None,
    implementation: Annotated[
        list[_Implementation] | None,
        typer.Option(
            help="dense is the definition differentiated by autograd, matmul one bare product. Repeatable.",
            show_default="all that can run",
        ),
    ] = None,
    similarity: Annotated[Literal["cosine", "kl"], typer.Option(help="Similarity of pixels.")] = "cosine",
    data: Annotated[
        Literal["clustered", "random"],
        typer.Option(help="Whether pixels of a class lie together, or features and labels are independent."),
    ] = "clustered",
    spread: Annotated[
        float,
        typer.Option(min=0, help="Deviation within a class, in that of the class centres, of clustered data."),
    ] = 1.5,
    kept: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of source pixels whose cycle is kept, of data that is made for it; at least --cover.",
            show_default="what the data gives, or 0.72 with --cover",
        ),
    ] = None,
    cover: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of target pixels that are matched, of the same data.",
            show_default="what the data gives, or 0.22 with --kept",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; their median counts.")] = 5,
    max_seconds: Annotated[
        float, typer.Option(min=0, help="Begin no further repeat of a measurement after that long.")
    ] = 120,
    sweep: Annotated[
        str | None, typer.Option(help="Further sizes, for example 1024,2048,4096, to see how time and memory grow.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory against n: a PNG, PDF or SVG.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the records in this CSV, in place of older ones of the same kind.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure value and both gradients of association: time, peak memory, and error against fp64.

    Each line is measured in fresh processes; where several ranks take part, the slowest and the largest count.
    [bold]times product[/] is the time over that of one bare matrix product of the same size and type, and
    [bold]at least[/] the number of products that value and gradients cannot do without on these data.
    Errors are relative to dense autograd in fp64, up to 12,000 pixels of all ranks.
    """
    sizes = [n, *_sizes(sweep)]
    if exchange:
        if communication:
            raise UserError("--exchange is the old name of --communication, and both are given; leave out --exchange")
        from dist_pca.config.aliases import warn_renamed

        warn_renamed("--exchange", "--communication", "bench association")
        communication = exchange
    from dist_pca.tools.bench import comparison, report
    from dist_pca.tools.bench.association import CONFIGURATION, Plan, cases, run
    from dist_pca.tools.bench.cases import COVER, KEPT

    made = kept is not None or cover is not None
    if made and data == "random":
        raise UserError("--data random: has the shares that chance gives; leave out --kept and --cover, or --data")

    if plot is not None:
        from dist_pca.tools.bench.picture import draw, require_matplotlib

        require_matplotlib()
    plan = Plan(
        sizes=sizes,
        channels=channels,
        dtypes=_values(dtype or _Dtype),
        world_size=world,
        communications=_values(communication or ()),
        implementations=_values(implementation or ()),
        similarity=similarity,
        data="shares" if made else data,
        spread=spread,
        kept=(KEPT if kept is None else kept) if made else None,
        cover=(COVER if cover is None else cover) if made else None,
        repeats=repeats,
        max_seconds=max_seconds,
    )
    to_measure = cases(plan)
    console = plain_console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(to_measure))
        records = run(to_measure, lambda done, what: bar.update(task, completed=done, description=what))
    if save is not None:
        report.save_results(save, "association", records, CONFIGURATION)
    if plot is not None:
        draw(records, report.device_name(), plot)
    if as_json:
        typer.echo(report.to_json(records))
        return
    ranks = f", {world} ranks" if world > 1 else ""
    printer = plain_console()
    printer.print(f"{report.device_name()}: association, C = {channels}, {similarity}, {plan.data} data{ranks}\n")
    for sized in comparison.terminal_tables(records):
        printer.print(sized, "")
    if sweep is not None:
        printer.print(report.rich_table("growth with n", comparison.growth(records)))


@app.command(
    "data", epilog=_examples("dist-pca bench data", "dist-pca bench data --only reading --only seeking --json")
)
def data(
    only: Annotated[
        list[_Measurement] | None,
        typer.Option(help="Measure this alone. Repeatable.", show_default="everything, in about two minutes"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; their median counts.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure building and reading of shards beside bare loops over the same codec and transforms.

    Ratios are of rates measured in turn in one run. Data are drawn for it, in a temporary folder.
    """
    from dist_pca.tools.bench.data import MEASUREMENTS

    records = []
    with _working() as (folder, tell):
        for name in _values(only or _Measurement):
            tell(f"measuring {name}")
            (folder / name).mkdir()
            records += MEASUREMENTS[name](folder / name, repeats)
    _print(records, "data", as_json=as_json)


@app.command("resume", epilog=_examples("dist-pca bench resume", "dist-pca bench resume --kills 25 --seed 1 --json"))
def resume(
    kills: Annotated[int, typer.Option(min=1, help="How often the run is killed; each costs a start.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the moments at which the run is killed.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Kill a small run of two processes again and again, some times inside a checkpoint write, and start it again.

    Weights, optimiser and metrics are then compared, bit by bit, with those of the run that was never killed. Another
    run is resumed on 1, 3 and 2 processes; its samples and losses are compared with those of a run that stays on 2.
    """
    from dist_pca.tools.bench.resume import measure_resume
    from dist_pca.tools.bench.worlds import measure_worlds

    with _working() as (folder, tell):
        records = [*measure_resume(folder, kills, seed, tell), *measure_worlds(folder, tell)]
    _print(records, "resume", as_json=as_json)


@app.command("train", epilog=_examples("dist-pca bench train", "dist-pca bench train --repeats 40 --json"))
def train(
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed steps of each loop; the median of their ratios counts.")
    ] = 150,
    as_json: AsJson = False,
) -> None:
    """Measure what the training loop costs beside a bare one over the same network, losses, optimiser and data.

    Both are in one run, on two processes or on all GPUs, and take turns step by step, so that what else the machine
    does falls on both. The loop writes a line of metrics at every step.
    """
    from dist_pca.tools.bench.train import measure_train

    with _working("training") as (folder, _):
        records = measure_train(folder, repeats)
    _print(records, "train", as_json=as_json)


@app.command(
    "scale",
    epilog=_examples("dist-pca bench scale", "dist-pca bench scale --worlds 4,8 --scope world --lovasz-bins 0 --json"),
)
def scale(
    worlds: Annotated[str, typer.Option(help="Numbers of ranks, with commas between them.")] = "8,16,32",
    scope: Annotated[Literal["rank", "world"], typer.Option(help="Candidates of the association.")] = "rank",
    lovasz_bins: Annotated[
        int, typer.Option(min=0, help="Bins of Lovasz-Softmax over all ranks; 0 sorts all ranks' pixels.")
    ] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, of which the mean counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure what a training step takes of one rank as ranks are added: seconds, memory and bytes sent, by phase.

    Every rank is a small process of its own with one source and one target image. They share this machine's cores, so
    seconds are CPU seconds of one rank, those of its step and of the threads in which gloo sends and adds up. The wall
    time of a step, in which the cores serve all ranks, is in the JSON.
    Network, batch norm over ranks, objective and the sum of gradients are those of training; DeepSpeed is left out.
    """
    from dist_pca.tools.bench.scale import ScaleCase, measure_scale, scale_rows

    numbers = _sizes(worlds, "--worlds")
    with _working() as (_, tell):
        records = measure_scale(numbers, ScaleCase(scope, lovasz_bins or None, steps), tell)
    _print(records, f"a step of one rank, association of scope {scope}", scale_rows(records), as_json=as_json)


@app.command("gpu", epilog=_examples("dist-pca bench gpu", "dist-pca bench gpu --minutes 25 --out h100.json"))
def gpu(
    out: Annotated[
        Path | None,
        typer.Option(
            help="The record, a JSON file; a CSV of the association bench is written beside it.",
            show_default="named after the GPU, among the records that come with dist-pca",
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time for everything; what comes last is cut off or left out.")
    ] = 9,
) -> None:
    """Run on this machine's GPU all that needs one: tests, benches and a short run, the most valuable first.

    The record has the device, versions, each test's outcome and all figures. It is written after each stage, and what
    fails is recorded and does not stop the rest. Needs a checkout with the extra [bold]dev[/], for the tests. The exit
    code is 1 if a stage failed or was cut off, and 2 without a GPU.
    """
    from dist_pca.tools.bench.gpu import default_out, measure_gpu, require_gpu, stages
    from dist_pca.tools.bench.gpu_record import gpu_column

    require_gpu()
    file = (out or default_out()).absolute()
    printer = plain_console()
    record = measure_gpu(file, minutes, stages(file.with_suffix(".csv")), printer.print)
    printer.print(f"{file} is the record; the README's table says of this GPU:")
    for row, cell in gpu_column([record]).items():
        printer.print(f"  {row}: {cell}")
    if any(stage["outcome"] != "done" for stage in record["stages"].values()):
        raise typer.Exit(1)


@app.command("table", epilog=_examples("dist-pca bench table", "dist-pca bench table results.csv"))
def table(
    file: Annotated[
        Path | None, typer.Argument(help="A CSV that --save wrote.", show_default="the one that comes with dist-pca")
    ] = None,
) -> None:
    """Print the README's tables of measurements, in Markdown."""
    from dist_pca.tools.bench.comparison import readme_tables
    from dist_pca.tools.bench.report import RESULTS, load_results

    typer.echo(readme_tables(load_results(file or RESULTS, "association")))


@contextmanager
def _working(what: str = "") -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Yield a temporary folder, and a function that shows what is being done."""
    with tempfile.TemporaryDirectory() as folder, plain_console(stderr=True).status(what) as status:
        yield Path(folder), status.update


def _print(
    records: "Sequence[Record]", what: str, rows: Sequence[Mapping[str, str]] | None = None, *, as_json: bool
) -> None:
    """Print records as JSON, or as a table of these rows, else with a row for each record."""
    from dist_pca.tools.bench.report import device_name, rich_table, to_json

    if as_json:
        typer.echo(to_json(records))
        return
    if rows is None:
        values = [f"{r['value']:.4g}" if isinstance(r["value"], float) else str(r["value"]) for r in records]
        rows = [
            {"": str(r["name"]), "value": value, "unit": str(r.get("unit") or "")}
            for r, value in zip(records, values, strict=True)
        ]
    plain_console().print(rich_table(f"{device_name()}: {what}", rows))


def _values(chosen: Iterable[Enum]) -> tuple[Any, ...]:
    return tuple(choice.value for choice in chosen)


def _sizes(sizes: str | None, option: str = "--sweep") -> list[int]:
    parts = [] if sizes is None else sizes.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {sizes}: give sizes above 0 with commas between them, for example 1024,2048,4096")
    return [int(part) for part in parts]
