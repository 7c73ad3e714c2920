"""Predictions as tables for the terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dist_pca.tools.planning.advice import SLOWER, as_overrides
from dist_pca.tools.planning.candidates import Candidates
from dist_pca.tools.planning.predict import Prediction

MEANING = (
    "Memory is what all tensors of one GPU take at the fullest moment of a step, as torch.cuda.max_memory_allocated "
    "measures; usable is the GPU's memory without the reserve for what is no tensor. Memory and bytes are held to "
    "measured runs by tests, to within 15 %. Times are estimates from data sheets and the assumptions in --help, and "
    "have not been held to runs on GPUs: for good ones, measure a few steps and set those to what they reached."
)
"""What the predictions are, and how far to trust them."""
GRAD_CACHE = (
    "training.grad_cache is not in these figures: it keeps the outputs of all micro-batches of an update, associates "
    "them together and runs the network's forward pass twice. Measure a few steps before you rely on it."
)
"""What a prediction leaves out where micro-batches have one loss."""
CANDIDATES = (
    "Under scope world, the operations of one GPU grow with the number of GPUs, and those of all GPUs with its square. "
    "Scope node keeps them constant. The budget keeps candidates from all nodes, and as many pixels of each image as "
    "cost no more than scope node does with all of them."
)
"""What the candidates of the association cost as GPUs are added."""


def headline(*predictions: Prediction) -> str:
    """Which run on which machines: one size, or several in rising order."""
    first, last = predictions[0], predictions[-1]
    config, cluster = first.config, last.cluster
    source, target = first.images
    images = f"{source} source + {target} target images" if target else f"{source} source images"
    times = f" x {config.training.accumulation} micro-batches" if config.training.accumulation > 1 else ""
    sizes = " to ".join(f"{size:,}" for size in dict.fromkeys((first.cluster.size, cluster.size)))
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}" if first is last else f"{cluster.per_node} per node"
    return (
        f"{config.name} ({config.model.backbone}, {config.training.precision}) on {sizes} x {cluster.gpu.name}, "
        f"{nodes}: ZeRO {first.stage}, {images} per GPU{times}"
    )


def memory_table(prediction: Prediction) -> Table:
    """Each part at the peak, and when it takes most."""
    memory = prediction.memory
    table = _table("memory per GPU", "", "at the peak", "at most")
    for part, count in memory.parts.items():
        table.add_row(part, size(count), size(memory.most[part]))
    table.add_row(Text(f"peak, in {memory.phase}", "bold"), Text(size(memory.peak), "bold"))
    table.add_row("usable", size(prediction.usable), "it fits" if prediction.fits else Text("does not fit", "red"))
    return table


def traffic_table(prediction: Prediction) -> Table:
    """What a GPU sends in an update, and how long that takes alone."""
    table = _table("sent by each GPU in an update", "", "bytes", "alone")
    for part, seconds in zip(prediction.traffic, prediction.communication_seconds, strict=True):
        how = prediction.communication.get(part.kind.removeprefix("association "))
        beside = " beside backward" if part.overlaps else ""
        table.add_row(part.kind + (f" ({how})" if how else ""), size(part.bytes), duration(seconds) + beside)
    if not prediction.traffic:
        table.add_row("nothing", "", "")
    return table


def time_table(prediction: Prediction) -> Table:
    """The time of an update, and of the run."""
    timing = prediction.timing
    table = _table("an update", "", "", "")
    table.add_row("network", duration(timing.network_compute), f"{prediction.network_flops / 1e12:,.1f} TFLOP")
    table.add_row(
        "association", duration(timing.association_compute), f"{prediction.association_flops / 1e12:,.2f} TFLOP"
    )
    table.add_row("communication that is waited for", duration(timing.exposed_communication))
    table.add_row("loader", duration(timing.loader))
    table.add_row(Text("step", "bold"), Text(duration(timing.step), "bold"), f"bound by {timing.bound}")
    table.add_row(f"{prediction.steps:,} steps", f"{prediction.hours:,.2f} h", f"{prediction.gpu_hours:,.1f} GPU-hours")
    return table


def candidates_table(costs: Sequence[Candidates]) -> Table:
    """Tabulate what each choice of candidates costs the association."""
    columns = ("GPUs", "candidates", "TFLOP", "of all", "", "sent")
    table = _table("association of an update on one GPU, by candidates", "", *columns)
    for cost in costs:
        table.add_row(
            cost.scope if cost.budget is None else f"{cost.scope}, pixel_budget={cost.budget}",
            f"{cost.gpus:,}",
            f"{cost.pixels:,}",
            number(cost.flops / 1e12),
            number(cost.gpus * cost.flops / 1e12),
            duration(cost.seconds),
            size(cost.sent_bytes),
        )
    return table


def sweep_table(predictions: Sequence[Prediction]) -> Table:
    """Tabulate predictions for increasing numbers of GPUs, at constant images per GPU."""
    columns = ("GPUs", "batch", "step", "images/s", "bound", "memory", "", "sent", "hours", "GPU-h")
    table = _table("as many images per GPU on more GPUs, for as many images in all", *columns)
    for prediction in predictions:
        values = prediction.as_dict()
        table.add_row(
            f"{prediction.cluster.size:,}",
            f"{values['images_per_update']:,}",
            duration(prediction.timing.step),
            f"{values['images_per_second']:,.0f}",
            prediction.timing.bound,
            size(prediction.memory.peak),
            "" if prediction.fits else Text("too much", "red"),
            size(sum(part.bytes for part in prediction.traffic)),
            number(prediction.hours),
            number(prediction.gpu_hours),
        )
    return table


def advice(prediction: Prediction, best: Prediction | None) -> str:
    """What to take, in words and as overrides."""
    if best is None:
        return (
            "Nothing fits. Take fewer images per GPU (more GPUs, or training.accumulation), training.precision=bf16, "
            "model.activation_checkpointing=true or a smaller data.crop."
        )
    gain = f"{duration(best.timing.step)} per step, {size(best.memory.peak)} per GPU"
    return (
        f"Take {' '.join(as_overrides(best))}: {gain}; as configured {duration(prediction.timing.step)}, "
        f"{size(prediction.memory.peak)}. The widest scope of what fits and is at most {SLOWER} times as slow as the "
        "fastest."
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{number(count)} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{number(1000 * seconds)} ms" if seconds < 1 else f"{seconds:,.2f} s"


def number(value: float) -> str:
    """Three digits, or all in front of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
