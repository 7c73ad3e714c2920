import sys
from pathlib import Path

import pytest

from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.training.launch import launch, launch_command, shown


def test_the_command_names_launcher_run_and_overrides() -> None:
    command = launch_command("camvid", ["seed=1"], launcher="accelerate/cpu", processes=3, resume=True)
    assert shown(command) == (
        f"accelerate launch --config_file {resource('launch', 'accelerate/cpu')} --num_processes 3 "
        "-m dist_pca.train camvid seed=1 --resume"
    )


def test_a_launcher_of_ones_own_is_taken_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert str(tmp_path / "mine.yaml") in launch_command("camvid", launcher=str(tmp_path / "mine.yaml"))


def test_an_unknown_launcher_gives_the_nearest() -> None:
    with pytest.raises(UserError, match="the nearest is accelerate/gpu_zero3"):
        launch_command("camvid", launcher="accelerate/gpu_zero33")


def test_the_exit_code_is_the_commands() -> None:
    assert launch([sys.executable, "-c", "raise SystemExit(7)"]) == 7
