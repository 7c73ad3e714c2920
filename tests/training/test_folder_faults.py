"""Whatever an operator does to a file of a run folder, the run resumes or is refused in a line, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.folder_faults import FILES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    subprocess.run([sys.executable, "-m", "tests.training.folder_faults", str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", FILES)
def test_a_spoiled_file_costs_no_checkpoint_and_at_most_a_line(folder: Path, file: str) -> None:
    command = [sys.executable, "-m", "tests.training.folder_faults", str(folder), file]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == 8
    for outcome in outcomes:
        said = f"{file} {outcome['fault']}: {outcome['output']}"
        assert outcome["code"] in (0, 2), said
        assert "Traceback" not in outcome["output"], said
        assert outcome["lost"] == 0, said
        if outcome["code"] == 2:
            assert len(outcome["errors"]) == 1, said
            # A tracker is started last, when the run has been entered into its logs.
            assert file == "tensorboard" or not outcome["touched"], (said, outcome["touched"])
