"""Line charts as SVG elements that take their colours and font from the page around them."""

import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 3.6, 2.1
"""Inches of 72 units each; the page scales a chart to its column."""
_TEXT, _GRID = "#010203", "#040506"
_SERIES = ("#070801", "#070802", "#070803", "#070804", "#070805", "#070806")
"""Colours that occur nowhere else, each to be replaced by a variable of the page's style sheet."""
COLORS = len(_SERIES)
DASHES = ("", "5 2.5", "1.5 2", "6 2 1.5 2")
"""SVG dash patterns by `Line.dash`."""
_POINTS = 400
"""Points drawn of a line; a chart of a few hundred pixels cannot show more."""


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    color: int
    """Index of a colour of the page, below `COLORS`."""
    dash: int
    """Index into `DASHES`."""


def has_matplotlib() -> bool:
    """Whether charts can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def chart(lines: Sequence[Line], *, name: str, per_cent: bool = False, from_zero: bool = False) -> str:
    """Draw lines over steps as an `<svg>` element for an HTML page, whose text is text.

    Colours are `currentColor`, `var(--grid)` and `var(--series-N)`. The element refers to nothing outside of itself.

    Args:
        lines: What to draw; lines without a value are left out.
        name: Unique in the page, so that the ids of the element's parts are too.
        per_cent: Show values in 0..1 as per cent.
        from_zero: Begin the axis of values at 0 rather than at the smallest value.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    # Room for labels of seven characters; a layout that measures them takes twice as long.
    axes = figure.add_axes((0.155, 0.12, 0.83, 0.84))
    for line in lines:
        steps, values = _thinned(line.steps, line.values)
        marker = "o" if len(steps) == 1 else ""
        color = _SERIES[line.color % COLORS]
        style = (0, tuple(map(float, DASHES[line.dash].split()))) if DASHES[line.dash] else "-"
        axes.plot(steps, values, color=color, linestyle=style, linewidth=1.7, marker=marker, markersize=4)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_per_cent_tick if per_cent else _tick))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(colors=_TEXT, labelsize=9, length=0)
    axes.grid(visible=True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True)
    return _for_page(file.getvalue())


def describe(lines: Sequence[Line], *, per_cent: bool = False) -> str:
    """Say in words what a chart shows: the first and last value of each line."""

    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if per_cent else f"{value:.4g}"

    parts = [
        f"{line.name}: {number(line.values[0])} at step {line.steps[0]:,}, {number(line.values[-1])} at step "
        f"{line.steps[-1]:,}"
        for line in lines
        if line.values
    ]
    return "; ".join(parts)


def _tick(value: float, _place: int | None = None) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (unit != "k" and abs(value) >= size):
            return f"{value / size:g}{unit}"
    return f"{round(value, 12):g}"


def _per_cent_tick(value: float, _place: int | None = None) -> str:
    return f"{round(100 * value, 6):g} %"


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Means of as many neighbours as leave few enough points to draw."""
    size = math.ceil(len(steps) / _POINTS) or 1
    groups = [range(first, min(first + size, len(steps))) for first in range(0, len(steps), size)]
    return (
        [steps[group[-1]] for group in groups],
        [sum(values[place] for place in group) / len(group) for group in groups],
    )


def _for_page(svg: str) -> str:
    """Turn matplotlib's SVG file into an element whose colours are the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"/>', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # The page gives width and height, the view box keeps the proportions, and HTML needs no namespaces.
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)")
    for number, color in enumerate(_SERIES):
        svg = svg.replace(color, f"var(--series-{number})")
    return re.sub(r"\n\s*", "\n", svg).strip()
