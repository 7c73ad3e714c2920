"""How many files a reader has to open to follow the trainer."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Files of the package that each action runs through."""
    command = [sys.executable, "-m", "tests.training.paths_run", str(tmp_path_factory.mktemp("paths"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_rooms(files: list[str], *rooms: str) -> list[str]:
    return [file for file in files if file.startswith(rooms) or "/" not in file]


@pytest.mark.slow
def test_a_step_runs_through_twelve_files_beside_data_network_and_losses(files: dict[str, list[str]]) -> None:
    found = [file for file in of_rooms(files["step"], "training/", "resilience/") if file != "distributed.py"]
    assert "training/trainer.py" in found
    assert len(found) <= 12, found


@pytest.mark.slow
def test_a_checkpoint_goes_through_five_files_from_the_loop_to_the_disk(files: dict[str, list[str]]) -> None:
    # What the trainer adds to the state, and the phase's name, are read in passing.
    state = {f"training/{name}.py" for name in ("metrics", "non_finite", "profiling")}
    found = [file for file in of_rooms(files["save"], "training/") if file not in state and file != "distributed.py"]
    assert "files.py" in found
    assert len(found) <= 5, found


@pytest.mark.slow
def test_restoring_goes_through_three_files(files: dict[str, list[str]]) -> None:
    found = of_rooms(files["restore"], "training/")
    assert "training/deepspeed.py" in found
    assert len(found) <= 3, found
