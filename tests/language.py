"""Refuse a private language in docstrings, comments, messages and the manual; `make lint` runs this script.

A docstring's first line must stand alone in a tooltip, and a thing has the name that an engineer from the field would
search for. Each finding is one line, `file:line: what: use instead`; the exit code is 1 where there is any.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

OPENINGS = re.compile(r"\s*(Of|The same|That of|Likewise|Their|Its|And|Else)\b")
BANNED = {
    r"(?:go|goes|going|gone|went) on": "continue, resume",
    r"mend(?:s|ed|ing)?": "fix",
    r"for want of": "because ... is missing, out of",
    r"(?:take|takes|taken|taking|took) up": "resume, use",
    r"(?:share|shares|shared|sharing) out": "divide evenly",
    r"(?:go|goes|going|went) round": "pass around the ring, send and receive",
    r"(?:bring|brings|brought|flow|flows|flowed) home": "reduce-scatter, send to the owner",
    r"nobody(?:'s)?": "no process, stale",
    r"at hand": "gathered, available",
    r"(?:tell|tells|telling|told)(?!:)": "log, print, report, show, distinguish",
    r"roomy": "large",
    r"spared": "no_decay, excluded",
    r"(?:lead|leads|led) back": "consistent",
    r"middles": "matched targets",
}
_BANNED = {re.compile(rf"\b{words}\b".replace(" ", r"\s+"), re.IGNORECASE): use for words, use in BANNED.items()}


def findings(name: str, text: str) -> list[str]:
    """Lines `name:line: what: use instead` about a file's text; names that end in .py are parsed as Python."""
    if not name.endswith(".py"):
        return [f"{name}:{line}: {finding}" for line, finding in sorted(_banned(text, 1))]
    found = [
        (line, f"a docstring opens with {opening[1]!r}: write a first line that stands alone")
        for line, docstring in _docstrings(text)
        if (opening := OPENINGS.match(docstring))
    ]
    for line, prose in (*_strings(text), *_comments(text)):
        found += _banned(prose, line)
    return [f"{name}:{line}: {finding}" for line, finding in sorted(found)]


def _banned(prose: str, first: int) -> Iterator[tuple[int, str]]:
    for pattern, use in _BANNED.items():
        for match in pattern.finditer(prose):
            yield first + prose.count("\n", 0, match.start()), f"{' '.join(match[0].split())!r}: use {use}"


def _docstrings(code: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def _strings(code: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def _comments(code: str) -> Iterator[tuple[int, str]]:
    """Comments, those of consecutive lines as one text."""
    first, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != first + len(lines):
            yield first, "\n".join(lines)
            lines = []
        first = first if lines else token.start[0]
        lines.append(token.string.lstrip("#"))
    if lines:
        yield first, "\n".join(lines)


def main() -> int:
    """Print every finding in this checkout."""
    patterns = ("dist_pca/**/*.py", "*.md", "docs/*.md", "launch/slurm/*.sbatch")
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    names = [(path.relative_to(ROOT).as_posix(), path) for path in files]
    found = [line for name, path in names for line in findings(name, path.read_text("utf-8"))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
