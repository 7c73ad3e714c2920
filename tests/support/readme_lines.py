"""The command lines that are printed for readers, in the README and in the heads of shipped files.

A line is printed in a `sh` block of the README, indented in a comment of a shipped file, or between back quotes in
either's text; lines that end in a backslash go on in the next one. Three things between back quotes are no lines but
talk about a command, and nobody can type them: an ellipsis; a launcher without `-m`; words that only name a command
which wants more (`dist-pca train`). Indented options of a line (`--exclude ...`) are none either.

A line that no test runs bears the mark: in a block after it, in the README's text in parentheses right after it, in
a comment somewhere in the paragraph that it is in.
"""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from dist_pca.cli import app
from dist_pca.resources import resource

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SHIPPED = resource("configs", "demo").parents[1]
in_checkout = pytest.mark.skipif(not README.is_file(), reason="the README is beside the tests in a checkout only")
MARK = "not run by the tests"
HEADS = ("launch/slurm/*.sbatch", "launch/accelerate/*.yaml", "configs/*.yaml", "shards/*.yaml", "Makefile")
_PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:dist-pca|accelerate|make|pip|python3?|torchrun|sbatch|srun|bash|sh)\b")


class Line(NamedTuple):
    """A command line, or talk about one."""

    file: str
    text: str
    marked: bool


def is_talk(text: str) -> bool:
    """Whether this is no line that could be typed."""
    words = shlex.split(text)
    if "..." in text or len(words) == 1:
        return True
    if words[:2] == ["accelerate", "launch"]:
        return "-m" not in words
    command: Any = typer.main.get_command(app)
    for word in words[1:] if words[0] == "dist-pca" else ("no command",):
        command = getattr(command, "commands", {}).get(word)
    return hasattr(command, "commands") or any(parameter.required for parameter in getattr(command, "params", ()))


def printed() -> list[Line]:
    """All of them, talk too, each text once, in the order in which they stand."""
    readme = readme_lines(README.read_text()) if README.is_file() else []
    heads = (path for pattern in HEADS for path in sorted(SHIPPED.glob(pattern)))
    found: dict[str, Line] = {}
    in_heads = (line for path in heads for line in head_lines(path.relative_to(SHIPPED).as_posix(), path.read_text()))
    for line in (*readme, *in_heads):
        found.setdefault(line.text, line)
    return list(found.values())


def lines(*files: str) -> list[Line]:
    """Those that can be typed and bear no mark, in files whose path begins like this."""
    return [line for line in printed() if line.file.startswith(files) and not line.marked and not is_talk(line.text)]


def readme_lines(readme: str) -> list[Line]:
    """What the README's text prints."""
    found = []
    for part in re.split(r"(```.*?```)", readme, flags=re.DOTALL):
        if part.startswith("```sh\n"):
            for line in _joined(part[len("```sh\n") : -len("```")]).splitlines():
                text, _, comment = line.partition(" #")
                found += [Line("README.md", text.strip(), MARK in comment)] if text.strip() else []
        elif not part.startswith("```"):
            found += _between_back_quotes("README.md", part, rf" \({MARK}", marked=False)
    return found


def head_lines(file: str, text: str) -> list[Line]:
    """What a shipped file prints in its comments."""
    found = []
    for paragraph in re.split(r"^#?\n", text, flags=re.MULTILINE):
        comments = "\n".join(re.findall(r"^#(?!!|SBATCH) ?(.*)", paragraph, re.MULTILINE))
        marked = MARK in comments
        found += [Line(file, line, marked) for line in re.findall(r"^  +(?!-)(\S.*)", _joined(comments), re.MULTILINE)]
        found += _between_back_quotes(file, comments, "(?!)", marked=marked)
    return found


def _between_back_quotes(file: str, text: str, mark: str, *, marked: bool) -> list[Line]:
    codes = re.finditer(r"`([^`]+)`", " ".join(text.split()))
    return [
        Line(file, code[1], marked or re.match(mark, code.string[code.end() :]) is not None)
        for code in codes
        if _PROGRAM.match(code[1])
    ]


def _joined(text: str) -> str:
    return re.sub(r" *\\\n\s*", " ", text)
