"""Wheel and sdist, each installed into an environment of its own away from the checkout, have all that is needed."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from dist_pca.resources import names

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip")
MAKE_SDIST = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(ROOT, sys.executable, "-c", MAKE_SDIST, str(folder))
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Path:
    """A virtual environment with dist-pca from one of the two, and with the dependencies that the tests have."""
    folder = tmp_path_factory.mktemp(request.param)
    made_from = sdist if request.param == "sdist" else ROOT
    run(folder, *PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", ".", str(made_from))
    (wheel,) = folder.glob("dist_pca-*.whl")
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    python = str(folder / "environment/bin/python")
    run(folder, *PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    # A path in a .pth file is searched last, and the .pth files in it, such as an editable dist-pca's, are not read.
    site = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "environment"


@pytest.mark.slow
def test_what_is_installed_runs_with_all_configs_recipes_and_scripts(environment: Path) -> None:
    def python(code: str) -> list[str]:
        return run(environment, "bin/python", "-c", code).splitlines()

    (place,) = python("import dist_pca; print(dist_pca.__file__)")
    assert Path(place).is_relative_to(environment)
    for kind in ("configs", "shards", "launch"):
        listing = f"from dist_pca.resources import names; print(*names({kind!r}), sep='\\n')"
        assert python(listing) == names(kind)
    assert "Usage" in run(environment, "bin/dist-pca", "train", "--help")
    assert "ids" in run(environment, "bin/dist-pca", "shards", "recipes", "folder")


@pytest.mark.slow
def test_files_that_are_no_python_are_installed_and_tests_are_not(environment: Path) -> None:
    (site,) = environment.glob("lib/python*/site-packages")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dist_pca").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert wanted <= there
    assert not any(path.startswith(("tests/", "docs/")) for path in there)


@pytest.mark.slow
def test_the_sdist_has_tests_manual_and_what_is_generated_from_but_no_runs(sdist: Path) -> None:
    with tarfile.open(sdist) as content:
        rooms = {Path(name).parts[1] for name in content.getnames()}
    assert {
        "dist_pca",
        "configs",
        "shards",
        "launch",
        "tests",
        "docs",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    } <= rooms
    assert not rooms & {"runs", ".venv", ".git"}
