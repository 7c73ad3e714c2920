"""The README says what is so."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_pca.cli import app

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="the README is beside the tests in a checkout only")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_its_python_runs() -> None:
    for block in blocks("python"):
        exec(compile(block.replace("8464", "200"), str(README), "exec"), {})


def test_every_file_it_names_is_there() -> None:
    named = re.findall(r"(?:launch/accelerate|configs|shards)/[\w/]+\.\w+", README.read_text())
    assert named
    for path in named:
        assert (README.parent / path).is_file(), path


def test_every_option_it_shows_is_the_command_lines() -> None:
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.split() for line in lines if line.startswith("dist-pca")]
    assert commands
    for _, *words in commands:
        name = [
            word
            for word in words[:2]
            if word in ("shards", "build", "inspect", "train", "evaluate", "bench", "association", "table")
        ]
        shown = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{name} {option}"
