"""Which ranks print an error that each of them finds by itself, before any of them waits for another."""

import os
import subprocess
import sys

import pytest

REFUSED = "config nowhere.yaml: no such file"


def start(rank: int, *, delay: float, ended_after: float | None = None) -> tuple[int, str]:
    """Start one rank of a run that cannot be; gives its exit code, and what it prints.

    Args:
        rank: The rank.
        delay: Seconds for which another rank than 0 waits before it prints.
        ended_after: Seconds after which the launcher ends the rank with SIGTERM; None does not.
    """
    lines = ["import os, signal, threading", "from dist_pca import train", f"train.ERROR_DELAY = {delay}"]
    if ended_after is not None:
        lines.append(f"threading.Timer({ended_after}, os.kill, (os.getpid(), signal.SIGTERM)).start()")
    lines.append("train.main('nowhere.yaml')")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"RANK": str(rank)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(("rank", "printed"), [(0, f"error: {REFUSED}"), (3, f"error: rank 3: {REFUSED}")])
def test_an_error_is_printed_by_rank_0_and_by_a_rank_that_alone_has_it(rank: int, printed: str) -> None:
    assert start(rank, delay=0) == (2, printed)


def test_a_rank_that_is_ended_because_of_rank_0_prints_nothing() -> None:
    assert start(3, delay=60, ended_after=2) == (2, "")
