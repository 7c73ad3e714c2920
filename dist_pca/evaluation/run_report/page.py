"""The HTML page of a report: sections of tables, charts and pictures, in one file that needs no other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import jinja2

Color = tuple[int, int, int]


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    share: float | None = None
    """Length of its bar, or strength of its tint, in 0..1."""
    swatch: Color | None = None
    """Colour that stands before the text."""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose rows begin with their heading."""

    kind: ClassVar[str] = "table"
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    style: Literal["words", "numbers", "bars", "heat"] = "words"
    """Cells are text, numbers, numbers with a bar, or numbers with a tint."""
    folded: bool = False
    """Shown only when it is asked for."""


@dataclass(frozen=True)
class Facts:
    """The few numbers that a reader looks for first: name, value and a remark."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str, str]]


class Chart(NamedTuple):
    """A line chart."""

    title: str
    unit: str
    svg: str
    """An element that `charts.chart` made."""
    description: str


class LegendEntry(NamedTuple):
    """What a line of a chart, or a colour of a picture, stands for."""

    name: str
    color: int | Color
    """Index of a series of charts, or a colour."""
    dash: str = ""
    """SVG dash pattern of a line."""


@dataclass(frozen=True)
class Charts:
    """Charts of the same lines, side by side as far as there is room."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]
    legend: Sequence[LegendEntry] = ()


class Picture(NamedTuple):
    """An image with its description for readers who do not see it, and its caption."""

    source: str
    """A data URL."""
    alt: str
    caption: str
    size: tuple[int, int]
    """Width and height in pixels."""


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side as far as there is room, under a heading."""

    kind: ClassVar[str] = "gallery"
    title: str
    pictures: Sequence[Picture]
    legend: Sequence[LegendEntry] = ()
    wide: bool = False
    """The pictures are drawings that a narrow screen scrolls rather than shrinks."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Text of a file, folded until it is asked for."""

    kind: ClassVar[str] = "code"
    summary: str
    text: str


Block = Table | Facts | Charts | Gallery | Text | Code


class Section(NamedTuple):
    """A section of the page."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""

    @property
    def anchor(self) -> str:
        """Id of the section's heading."""
        return "-".join(self.title.lower().split())


def render(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """Render the page.

    Args:
        title: Its heading.
        lead: Lines under the heading.
        sections: What follows; those without blocks are left out.
    """
    shown = [section for section in sections if section.blocks]
    return _template().render(title=title, lead=lead, sections=shown)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html")
