import os
from pathlib import Path

from dist_pca.training.launch_log import is_alive, log_launch, read_launch_log


def test_each_start_is_a_line_with_its_job_and_step(tmp_path: Path) -> None:
    log_launch(tmp_path, 0, 2, {"SLURM_JOB_ID": "7"})
    log_launch(tmp_path, 40, 4, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    log_launch(tmp_path, 60, 1, {})
    found = read_launch_log(tmp_path)
    assert [(start.step, start.world_size, start.job, start.restart) for start in found] == [
        (0, 2, "7", 0),
        (40, 4, "7", 1),
        (60, 1, None, 0),
    ]
    assert all(start.process == os.getpid() and is_alive(start) for start in found)


def test_a_run_that_never_started_has_none_and_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    assert read_launch_log(tmp_path) == []
    log_launch(tmp_path, 0, 2, {})
    with (tmp_path / "starts.jsonl").open("a") as lines:
        lines.write('{"time": 17')
    assert len(read_launch_log(tmp_path)) == 1
