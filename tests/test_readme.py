"""The README says what is so."""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from dist_pca.cli import app
from dist_pca.shards.build import build_shards
from tests.support.readme_lines import README, in_checkout, printed

COMMANDS = {
    *("shards", "build", "merge", "verify", "index", "inspect"),
    *("train", "evaluate", "predict", "export", "bench", "association", "data", "resume", "table"),
    *("doctor", "plan", "submit", "status", "study", "select", "matches", "report"),
}
pytestmark = in_checkout


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_its_python_runs() -> None:
    for block in blocks("python"):
        exec(compile(block.replace("8464", "200"), str(README), "exec"), {})


def test_every_file_it_names_is_there() -> None:
    named = re.findall(r"(?:launch/accelerate|launch/slurm|configs|shards)/[\w/]+\.\w+", README.read_text())
    assert named
    for path in named:
        assert (README.parent / path).is_file(), path


def test_every_option_it_shows_is_the_command_lines() -> None:
    commands = [line.text.split() for line in printed() if line.text.startswith("dist-pca ")]
    assert commands
    for _, *words in commands:
        name = [word for word in words[:2] if word in COMMANDS]
        shown = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{name} {option}"


def test_its_recipe_for_a_new_data_set_builds(tmp_path: Path) -> None:
    (recipe,) = (block for block in blocks("yaml") if "splits:" in block)
    (tmp_path / "harbour.yaml").write_text(recipe)
    root = tmp_path / "raw"
    for split in ("train", "val"):
        for folder in ("frames", "masks"):
            (root / folder / split / "pier 3").mkdir(parents=True)
        Image.new("RGB", (4, 1)).save(root / f"frames/{split}/pier 3/0001.jpg")
        Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8)).save(root / f"masks/{split}/pier 3/0001_id.png")
        manifest = build_shards(tmp_path / "harbour.yaml", root, tmp_path / split, split=split, workers=1)
        assert manifest.labelled
        assert manifest.pixel_counts == [1, 2]
