import signal
from pathlib import Path

import pytest

from dist_pca.errors import UserError
from dist_pca.resilience.exit_status import ExitCode, write_exit_status
from dist_pca.resilience.launch import launch, launch_command, process_count, quote_command
from dist_pca.resilience.preemption import SIGNALS
from dist_pca.resources import resource


def test_the_command_names_launcher_run_and_overrides() -> None:
    command = launch_command("camvid", ["seed=1"], launcher="accelerate/cpu", processes=3, resume=True)
    assert quote_command(command) == (
        f"accelerate launch --config_file {resource('launch', 'accelerate/cpu')} --num_processes 3 "
        "-m dist_pca.train camvid seed=1 --resume"
    )


def test_a_launcher_of_ones_own_is_taken_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert str(tmp_path / "mine.yaml") in launch_command("camvid", launcher=str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("gpus", "zero_stage", "launcher"),
    [(4, None, "gpu_zero2.yaml --num_processes 4"), (1, 3, "gpu_zero3.yaml --num_processes 1"), (0, 3, "cpu.yaml")],
)
def test_the_launcher_suits_the_machine_and_the_runs_stage(
    monkeypatch: pytest.MonkeyPatch, gpus: int, zero_stage: int | None, launcher: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert f"{launcher} -m dist_pca.train" in quote_command(launch_command("camvid", zero_stage=zero_stage))


def test_an_unknown_launcher_gives_the_nearest() -> None:
    with pytest.raises(UserError, match="the nearest is accelerate/gpu_zero3"):
        launch_command("camvid", launcher="accelerate/gpu_zero33")


@pytest.mark.parametrize(
    ("launcher", "processes", "expected"),
    [("accelerate/cpu", None, 2), ("accelerate/cpu", 3, 3), ("accelerate/multi_node", None, 16)],
)
def test_processes_are_the_commands_or_else_the_launcher_files(
    launcher: str, processes: int | None, expected: int
) -> None:
    assert process_count(launch_command("camvid", launcher=launcher, processes=processes)) == expected


def test_a_launcher_file_that_names_no_processes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("use_cpu: true\n")
    with pytest.raises(UserError, match=r"mine\.yaml: has no num_processes; add it, or pass --processes"):
        process_count(launch_command("camvid", launcher=str(tmp_path / "mine.yaml")))


def test_more_processes_than_gpus_are_refused_before_any_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = launch_command("camvid", launcher="accelerate/gpu_zero2")
    command[1:3] = ["-c", "raise SystemExit(7)"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match=r"^8 processes .* only 4 visible .* start 4 of them \(--processes"):
        launch(command, tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert launch(command, tmp_path) == 7


def test_the_exit_code_is_the_commands(tmp_path: Path) -> None:
    command = launch_command("camvid", launcher="accelerate/cpu")
    command[1:3] = ["-c", "raise SystemExit(7)"]
    assert launch(command, tmp_path) == 7


def test_the_ranks_word_counts_more_than_the_launchers_exit_code(tmp_path: Path) -> None:
    write_exit_status(tmp_path, ExitCode.DONE, "of an earlier start")
    command = launch_command("camvid", launcher="accelerate/cpu")
    (tmp_path / "prepared.json").write_text('{"code": 75, "message": "saved"}')
    command[1:3] = [
        "-c",
        f"from pathlib import Path; p = Path({str(tmp_path)!r}); assert not (p / 'exit.json').exists(); "
        "(p / 'prepared.json').rename(p / 'exit.json'); raise SystemExit(1)",
    ]
    assert launch(command, tmp_path) == ExitCode.SAVED


def test_signals_before_there_are_ranks_end_the_launcher(tmp_path: Path) -> None:
    command = launch_command("camvid", launcher="accelerate/cpu")
    command[1:3] = ["-c", "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"]
    handlers = [signal.getsignal(number) for number in SIGNALS]
    assert launch(command, tmp_path) == ExitCode.INTERRUPTED
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
