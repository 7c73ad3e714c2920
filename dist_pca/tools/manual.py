"""Tables of the manual that are generated: every config key, and every field of a line of metrics.

A page holds them between two comments, and the text around them is written by hand. To bring all pages up to date:

    python -m dist_pca.tools.manual docs
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from dist_pca.config import RunConfig
from dist_pca.training.metrics import METRIC_UNITS, METRICS

_BETWEEN = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WORDS: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", NoneType: "`null`"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def updated(page: str) -> str:
    """Return a page's text with its generated tables as they should be."""
    return _BETWEEN.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def config_tables() -> str:
    """Every config key by section: type, default and meaning."""
    return "\n\n".join(table for name, section in config_sections() if (table := _section(name, section)))


def config_sections(name: str = "", section: type[BaseModel] = RunConfig) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section of the config by its name with dots, and those inside it; the run itself has no name."""
    yield name, section
    for key, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from config_sections(f"{name}.{key}".lstrip("."), field.annotation)


def metrics_table() -> str:
    """Every field of a line of `metrics.jsonl`: unit and meaning."""
    rows = ["| field | unit | meaning |", "|---|---|---|"]
    for names, meaning in METRICS.items():
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        rows.append(f"| {shown} | {METRIC_UNITS.get(names, '')} | {meaning} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {"config": config_tables, "metrics": metrics_table}
"""Table by the name that a page gives."""


def _section(name: str, section: type[BaseModel]) -> str:
    """A section's heading and table of keys; nothing if it holds other sections alone."""
    rows = []
    for key, field in section.model_fields.items():
        if not _is_section(field.annotation):
            default = "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
            kind, meaning = _type(field.annotation, field.metadata), _meaning(field.description or "")
            rows.append(f"| `{key}` | {kind} | {default} | {meaning} |")
    if not rows:
        return ""
    heading = f"## `{name}`\n\n{' '.join((section.__doc__ or '').split())}" if name else "## Keys of the run itself"
    return "\n".join([heading, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _type(kind: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """Name a type in words, with its bounds."""
    if any(isinstance(one, BeforeValidator) for one in metadata):
        return "seconds or `[D-]HH:MM:SS`"
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        # A bound is itself, or inside a pydantic field.
        inner = [bound for one in parts[1:] for bound in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _type(parts[0], inner)
    if origin is Literal:
        return _alternatives([f"`{_value(part)}`" for part in parts])
    if origin in (Union, UnionType):
        # A list of texts would swallow the text that follows it, and null belongs to the end.
        ordered = sorted(parts, key=_place)
        return _alternatives([_type(part).replace(" or ", ", ") for part in ordered])
    if origin is tuple and parts[-1] is Ellipsis:
        return f"list of {_type(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(part) for part in parts)}]"
    if origin is dict:
        return "table"
    if _is_section(kind):
        return f"`{{{', '.join(kind.model_fields)}}}`"
    bounds = [
        f"{sign} {getattr(one, name):g}" for one in metadata for name, sign in _BOUNDS.items() if hasattr(one, name)
    ]
    return " ".join([_WORDS[kind], ", ".join(bounds)]).strip()


def _place(kind: Any) -> tuple[bool, bool]:
    return kind is NoneType, get_origin(kind) is tuple


def _alternatives(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _meaning(docstring: str) -> str:
    """Put a docstring on one line, with values as they are written in YAML."""
    words = " ".join(docstring.split()).replace("|", "\\|")
    return re.sub(
        r"\b(None|True|False)\b", lambda found: f"`{_value({'None': None}.get(found[0], found[0] == 'True'))}`", words
    )


def _value(value: Any) -> str:
    """Write a value as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


def main(folder: Path) -> None:
    """Rewrite the pages of a folder whose tables are out of date."""
    for path in sorted(folder.glob("*.md")):
        text = path.read_text("utf-8")
        if updated(text) != text:
            path.write_text(updated(text), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
