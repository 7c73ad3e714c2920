"""A sweep drawn: time and memory against n."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_pca.errors import UserError
from dist_pca.tools.bench.comparison import points, power_law, series
from dist_pca.tools.bench.report import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can distinguish too.
_COLOURS = {"dense": "#D55E00", "blockwise": "#0072B2", "triton": "#009E73", "matmul": "#7F7F7F"}
_NAMES = {"matmul": "bare product"}
_DASHES = {"fp32": "-", "bf16": (0, (4, 1.5))}
_MARKERS = {"": "o", "gather": "o", "ring": "s"}
_GIB = 2**30


def require_matplotlib() -> None:
    """Raises UserError where there is no matplotlib: before measuring, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'dist-pca[plot]'") from None


def draw(records: Sequence[Record], device: str, file: Path) -> None:
    """Draw seconds and peak memory against n, one line for each implementation and dtype, into a PNG, PDF or SVG.

    What ran out of memory stands as a cross where its line would have gone.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(11, 5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    _draw_lines(time_axes, records, "seconds", 1.0)
    _draw_lines(memory_axes, records, "peak_bytes", _GIB)
    time_axes.set_ylabel("seconds, value and both gradients")
    memory_axes.set_ylabel("peak memory above the start, GiB")
    sizes = sorted({int(record["n_source"] or 0) for record in records})
    for axes in (time_axes, memory_axes):
        axes.set_xlabel("n, pixels of each domain" + (" on each rank" if records[0]["world_size"] != 1 else ""))
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=30 if len(sizes) > 5 else 0)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="x", which="minor", length=0)
        axes.grid(visible=True, which="major", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = time_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, handlelength=3)
    ranks = f", {records[0]['world_size']} ranks" if records[0]["world_size"] != 1 else ""
    figure.suptitle(f"Association of n with n pixels, C = {records[0]['channels']}{ranks} ({device})", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def _draw_lines(axes: "Axes", records: Sequence[Record], field: str, unit: float) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    crosses = False
    for (implementation, dtype, communication), line in series(records).items():
        n, values = points(line, field)
        style: dict[str, Any] = {"color": _COLOURS[implementation], "linestyle": _DASHES[dtype]}
        name = " ".join(filter(None, (_NAMES.get(implementation, implementation), dtype, communication)))
        scaled = [value / unit for value in values]
        axes.plot(n, scaled, label=name, marker=_MARKERS[communication], markersize=4, linewidth=1.8, **style)
        # Small sizes are overhead: what lies beyond follows the last two.
        fit = power_law(n[-2:], scaled[-2:])
        missing = [int(record["n_source"] or 0) for record in line if record["note"]]
        if fit is None or not missing:
            continue
        beyond = [fit[0] * size ** fit[1] for size in missing]
        axes.plot([n[-1], *missing], [scaled[-1], *beyond], linewidth=1, alpha=0.5, color=style["color"], linestyle=":")
        axes.plot(missing, beyond, "x", markersize=8, markeredgewidth=2, color=style["color"])
        crosses = True
    if crosses:
        axes.plot([], [], "x", color="black", markersize=8, markeredgewidth=2, label="out of memory (extrapolated)")
