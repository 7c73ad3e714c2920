"""Ranks that find different checkpoints in their run folders are all refused, with what each of them found."""

import re
import socket
from pathlib import Path

import pytest

from dist_pca.errors import UserError
from dist_pca.files import write_record
from dist_pca.resilience.exit_status import read_exit_status
from dist_pca.training.checkpoint_loading import common_checkpoint
from tests.support.ranks import run_on_ranks
from tests.support.runs import build_streets, launch

STEP = "step-00000003"


def found_on_own_machine(rank: int, world_size: int, cases: list[str]) -> list[str]:
    """What a rank is told in each case, with a host name and a folder of its own."""
    host = f"node{rank}"
    socket.gethostname = lambda: host
    told = []
    for case in cases:
        try:
            told.append(str(common_checkpoint(Path(case) / host)))
        except UserError as error:
            told.append(str(error))
    return told


def write_checkpoint(folder: Path, **state: object) -> None:
    (folder / STEP).mkdir(parents=True)
    (folder / "latest").write_text(STEP)
    write_record(folder / STEP / "state.json", {"step": 3, "files": [], **state})


def test_each_rank_names_the_hosts_and_what_they_found(tmp_path: Path) -> None:
    apart, other, damaged, alike, none = (tmp_path / name for name in ("apart", "other", "damaged", "alike", "none"))
    write_checkpoint(apart / "node0")
    for rank in (0, 1):
        write_checkpoint(other / f"node{rank}", id=str(rank))
        write_checkpoint(damaged / f"node{rank}")
        write_checkpoint(alike / f"node{rank}")
    (damaged / "node1" / "latest").write_text("step-00000009")
    cases = [str(case) for case in (apart, other, damaged, alike, none)]
    on_ranks = run_on_ranks(found_on_own_machine, 2, tmp_path, cases)

    whole = rf"{STEP} with state\.json [0-9a-f]{{12}}"
    missing = r"\S+/latest: names 'step-00000009', which is not a checkpoint; .*"
    remedy = "set output to a folder that all machines share, or wait until it is in sync, and start the run again"
    for rank, told in enumerate(on_ranks):
        for case, (first, second) in enumerate([(whole, "no checkpoint"), (whole, whole), (whole, missing)]):
            seen = rf"{first} on node0 \(rank 0\); {second} on node1 \(rank 1\)"
            message = rf"{cases[case]}/node{rank}: not the same on all ranks: {seen}; {remedy}"
            assert re.fullmatch(message, told[case]), told[case]
        assert told[3:] == [str(alike / f"node{rank}" / STEP), "None"]


@pytest.mark.slow
def test_a_run_does_not_resume_where_a_machine_has_another_run_folder(tmp_path: Path) -> None:
    build_streets(tmp_path)
    done = launch(tmp_path, "apart")
    assert done.returncode == 0, done.stderr
    checkpoints = tmp_path / "runs" / "apart" / "checkpoints"
    (checkpoints / "latest").write_text(f"{STEP}\n")
    refused = launch(tmp_path, "apart", module="tests.training.apart_run")
    assert refused.returncode != 0
    for rank in (0, 1):
        assert re.search(
            rf"error: rank {rank}: \S+/checkpoints: not the same on all ranks: {STEP} with state\.json \w+ on \S+ "
            r"\(rank 0\); no checkpoint on \S+ \(rank 1\); set output to a folder that all machines share",
            refused.stderr,
        ), refused.stderr
    assert (checkpoints / "step-00000006").is_dir()
    for folder in ("runs", "runs/elsewhere"):
        outcome = read_exit_status(tmp_path / folder / "apart")
        assert outcome is not None
        assert outcome.code == UserError.EXIT_CODE
