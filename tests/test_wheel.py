"""The wheel, away from the checkout, has all that the package needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_pca.resources import names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the content of the wheel alone."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=280)
    (wheel,) = folder.glob("dist_pca-*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    return folder / "site"


def run(site: Path, *arguments: str) -> str:
    """Run Python in a folder without the checkout, with the wheel's package before an editable one."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=site.parent, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_away_from_the_checkout_with_all_configs_recipes_and_scripts(installed: Path) -> None:
    assert run(installed, "-c", "import dist_pca; print(dist_pca.__file__)").startswith(str(installed))
    for kind in ("configs", "shards", "launch"):
        listing = f"from dist_pca.resources import names; print(*names({kind!r}), sep='\\n')"
        assert run(installed, "-c", listing).splitlines() == names(kind)
    assert "Usage" in run(installed, "-m", "dist_pca.cli", "train", "--help")
    assert "ids" in run(installed, "-m", "dist_pca.cli", "shards", "recipes", "folder")


@pytest.mark.slow
def test_files_that_are_no_python_are_in_the_wheel_and_tests_are_not(installed: Path) -> None:
    package = ROOT / "dist_pca"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert wanted <= there
    assert not any(path.startswith(("tests/", "docs/")) for path in there)
