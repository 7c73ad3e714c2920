"""The command lines that are printed for readers: in `sh` blocks of Markdown pages, and in the heads of shipped files.

In a head, a line stands indented in a comment; options alone (`--exclude ...`) are none. Lines that end in a backslash
continue in the next one. A line that no test types bears the mark: in a block in a comment after it, in a head anywhere
in its paragraph.
"""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from accelerate.commands.launch import launch_command_parser

from dist_pca.cli import app
from dist_pca.resources import resource
from dist_pca.tools.cluster.job import app as job_app
from dist_pca.tools.doctor.commands import app as doctor_app
from dist_pca.tools.manual import config_sections
from dist_pca.train import main as train_main
from dist_pca.train import resolve_config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MANUAL = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in (README, ROOT / "CONTRIBUTING.md", *MANUAL) if page.is_file()]
SHIPPED = resource("configs", "demo").parents[1]
in_checkout = pytest.mark.skipif(not README.is_file(), reason="the README is beside the tests in a checkout only")
MARK = "not run by the tests"
HEADS = ("launch/slurm/*.sbatch", "launch/accelerate/*.yaml", "configs/*.yaml", "shards/*.yaml", "Makefile")


KEYS = {f"{name}.{key}".lstrip(".") for name, section in config_sections() for key in section.model_fields}


class Line(NamedTuple):
    """A command line."""

    file: str
    text: str
    marked: bool


def page_lines(page: Path) -> list[Line]:
    """The lines in `sh` blocks of a Markdown page."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in _joined(block).splitlines():
            text, _, comment = line.partition(" #")
            found += [Line(page.name, text.strip(), MARK in comment)] if text.strip() else []
    return found


def head_lines(file: str, text: str) -> list[Line]:
    """The lines in the comments of a shipped file."""
    found = []
    for paragraph in re.split(r"^#?\n", text, flags=re.MULTILINE):
        comments = "\n".join(re.findall(r"^#(?!!|SBATCH) ?(.*)", paragraph, re.MULTILINE))
        lines = re.findall(r"^  +(?!-)(\S.*)", _joined(comments), re.MULTILINE)
        found += [Line(file, line, MARK in comments) for line in lines]
    return found


def shipped_lines(*files: str) -> list[Line]:
    """The lines in heads of shipped files whose path begins like this."""
    paths = {path.relative_to(SHIPPED).as_posix(): path for pattern in HEADS for path in sorted(SHIPPED.glob(pattern))}
    return [
        line for file, path in paths.items() if file.startswith(files) for line in head_lines(file, path.read_text())
    ]


def parse(line: str) -> None:
    """Have the real command lines read a line and run nothing; raises where it is wrong."""
    for key in re.findall(r"\b[a-z_]+\.[a-z_.]+(?==)", line):
        assert key in KEYS, key
    words = [word for word in shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "0")) if not re.match(r"[A-Z_]+=", word)]
    scripts = [place for place, word in enumerate(words) if word.endswith(".sbatch")]
    if words[0] == "dist-pca":
        _parse(app, words[1:])
    elif words[0] == "accelerate" or "accelerate" in words[:4]:
        _parse_launched(words[words.index("accelerate") + 2 :])
    elif scripts:
        script, given = Path(words[scripts[0]]), words[scripts[0] + 1 :]
        assert (SHIPPED / script).is_file(), script
        _parse_script(script.stem, given)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words[1]
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\w+", words[-1].partition("[")[2]):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
    else:
        assert line == "source .venv/bin/activate", line


def named_options(text: str) -> None:
    """Check that a command that is talked about exists, and its options; it may lack arguments."""
    command: Any = typer.main.get_command(app)
    for word in shlex.split(text)[1:]:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
        elif word.startswith("--"):
            assert any(word in (*given.opts, *given.secondary_opts) for given in command.params), text
        else:
            assert not hasattr(command, "commands"), text


def _parse(application: typer.Typer, words: list[str]) -> None:
    command: Any = typer.main.get_command(application)
    context = command.make_context("dist-pca", list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)
    if {"config", "overrides"} <= context.params.keys():
        config = context.params["config"]
        # A config of the reader's own is replaced by one that is there.
        name = "demo" if config is None or config.endswith(".yaml") else config
        resolve_config(name, context.params["overrides"] or [])


def _parse_launched(words: list[str]) -> None:
    parser = launch_command_parser()
    parser.exit_on_error = False
    given = parser.parse_args(words)
    assert given.module, "accelerate launch: without -m"
    assert (SHIPPED / given.config_file).is_file(), given.config_file
    applications = {"dist_pca.train": _only(train_main), "dist_pca.cli": app, "dist_pca.doctor": doctor_app}
    _parse(applications[given.training_script], given.training_script_args)


def _parse_script(script: str, given: list[str]) -> None:
    if script == "evaluate":
        _parse(app, ["evaluate", *given])
    elif script == "build_shards":
        _parse(app, ["shards", *given] if given[0] == "merge" else ["shards", "build", *given])
    else:
        _parse(job_app, ["begin", "--gpus", "8", *given])
        _parse(_only(train_main), given)


def _only(function: Any) -> typer.Typer:
    application = typer.Typer()
    application.command()(function)
    return application


def _joined(text: str) -> str:
    return re.sub(r" *\\\n\s*", " ", text)
