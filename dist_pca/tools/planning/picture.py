"""A sweep drawn: time, memory and bytes against the number of GPUs."""

from collections.abc import Sequence
from pathlib import Path

from dist_pca.tools.planning.predict import Prediction

# Okabe and Ito's palette, which colour-blind readers can distinguish too.
_BOUNDS = {"compute": "#0072B2", "network": "#D55E00", "loader": "#009E73"}
_PARTS = {
    "weights": "#0072B2",
    "optimizer": "#56B4E9",
    "gradients": "#009E73",
    "activations": "#E69F00",
    "lovasz": "#CC79A7",
    "association": "#D55E00",
}
_KINDS = {
    "weights": "#0072B2",
    "gradients": "#009E73",
    "teacher": "#F0E442",
    "batch norm": "#56B4E9",
    "lovasz": "#CC79A7",
    "association features": "#D55E00",
    "association predictions": "#E69F00",
}
_GIB = 2**30


def draw(predictions: Sequence[Prediction], title: str, file: Path) -> None:
    """Draw images per second, memory by part, and bytes by kind, into a PNG, PDF or SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    speed, memory, sent = figure.subplots(1, 3)
    gpus = [prediction.cluster.size for prediction in predictions]
    rows = [prediction.as_dict() for prediction in predictions]

    rates = [row["images_per_second"] for row in rows]
    ideal = [rates[0] * count / gpus[0] for count in gpus]
    speed.plot(gpus, ideal, color="#7F7F7F", linestyle=":", label="if GPUs did not wait")
    speed.plot(gpus, rates, color="black", linewidth=1)
    for bound, colour in _BOUNDS.items():
        points = [(count, rate) for count, rate, row in zip(gpus, rates, rows, strict=True) if row["bound"] == bound]
        if points:
            speed.plot(*zip(*points, strict=True), "o", color=colour, label=f"bound by {bound}")
    speed.set_yscale("log")
    speed.set_ylabel("images per second")

    parts = [[row["memory_bytes"][part] / _GIB for row in rows] for part in _PARTS]
    memory.stackplot(gpus, parts, labels=list(_PARTS), colors=list(_PARTS.values()), alpha=0.85)
    memory.axhline(predictions[0].usable / _GIB, color="black", linestyle="--", label="usable")
    memory.set_ylim(bottom=0)
    memory.set_ylabel("memory of one GPU, GiB")

    for kind in dict.fromkeys(kind for row in rows for kind in row["sent_bytes"]):
        points = [(row["gpus"], row["sent_bytes"][kind] / _GIB) for row in rows if kind in row["sent_bytes"]]
        sent.plot(*zip(*points, strict=True), "o-", color=_KINDS[kind], markersize=4, label=kind)
    sent.set_yscale("log")
    sent.set_ylabel("sent by one GPU in an update, GiB")

    for axes in (speed, memory, sent):
        axes.set_xscale("log", base=2)
        axes.set_xticks(gpus, [f"{count:,}" for count in gpus], rotation=45)
        axes.tick_params(axis="x", which="minor", length=0)
        axes.set_xlabel("GPUs")
        axes.grid(visible=True, which="major", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)
