import os
import signal
import time

import pytest

from dist_pca.tools.bench.processes import OutOfMemory, in_fresh_processes


def rank_and_process(rank: int, offset: int) -> tuple[int, int]:
    print("this must not reach standard output")
    return rank + offset, os.getpid()


def fail_while_the_other_sleeps(rank: int) -> None:
    if rank == 1:
        raise ValueError("a rank with a reason")
    time.sleep(1000)


def run_out(_rank: int) -> bytes:
    return bytes(1 << 60)


def be_killed(_rank: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_rank_runs_in_a_process_of_its_own_and_results_come_by_rank(capfd: pytest.CaptureFixture[str]) -> None:
    results = in_fresh_processes(rank_and_process, 3, 10)
    assert [result[0] for result in results] == [10, 11, 12]
    assert len({os.getpid(), *(result[1] for result in results)}) == 4
    assert capfd.readouterr().out == ""


def test_a_rank_that_fails_ends_the_others_and_its_traceback_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*a rank with a reason"):
        in_fresh_processes(fail_while_the_other_sleeps, 2)


@pytest.mark.parametrize("function", [run_out, be_killed])
def test_want_of_memory_is_told_from_other_failures(function: object) -> None:
    with pytest.raises(OutOfMemory):
        in_fresh_processes(function, 1)  # type: ignore[arg-type]
