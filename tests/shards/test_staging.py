"""Builds that are killed, interrupted or shared out end in the very bytes of one build, and do nothing twice."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from dist_pca.errors import UserError
from dist_pca.shards.build import build_part, build_shards, merge_parts
from dist_pca.shards.manifest import load_manifest
from tests.support.raw_data import make_folder

SHARDS = 12


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    make_folder(tmp_path / "raw", samples=2 * SHARDS)
    return tmp_path / "raw"


def build(raw: Path, out: Path, **options: Any) -> None:
    build_shards("folder", raw, out, **{"workers": 1, "samples_per_shard": 2, **options})


def build_task(raw: Path, out: Path, task: int, tasks: int = 3, **options: Any) -> None:
    build_part("folder", raw, out, task=task, tasks=tasks, **{"workers": 1, "samples_per_shard": 2, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def started(function: Callable[..., None], *arguments: Any, **options: Any) -> BaseProcess:
    """The call in a process of its own; forked, so that it begins at once."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished shard, staged or in place, by number."""
    found = {}
    for path in [*out.glob("shard-*.tar"), *out.glob(".building/shard-*.tar")]:
        if path.parent == out or path.with_suffix(".json").exists():
            state = path.stat()
            found[path.name[: len("shard-000000")]] = (state.st_ino, state.st_mtime_ns)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_instant_change_no_byte_and_undo_no_finished_shard(raw: Path, tmp_path: Path, seed: int) -> None:
    build(raw, tmp_path / "whole")
    out, draw = tmp_path / "out", random.Random(seed)
    kills = 0
    while not (out / "manifest.json").exists():
        before = finished_shards(out) if out.exists() else {}
        process = started(build, raw, out)
        process.join(draw.uniform(0.0, 0.02 + 0.01 * kills))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
        after = finished_shards(out) if out.exists() else {}
        assert before.items() <= after.items()
        assert kills < 200
    assert kills > 0
    build(raw, out)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("call", ["replace", "unlink", "rmtree"])
@pytest.mark.parametrize("times", range(0, 16, 3))
def test_a_kill_while_shards_are_put_in_place_is_made_good(
    raw: Path, tmp_path: Path, call: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(raw, tmp_path / "whole")
    out = tmp_path / "out"
    build(raw, out, unlabelled=True)  # what --force replaces

    def die_at_the_end() -> None:
        owner: Any = shutil if call == "rmtree" else Path
        real, left = getattr(owner, call), times

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if (out / ".building/manifest.json").exists():
                left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, call, counted)
        build(raw, out, force=True)

    process = started(die_at_the_end)
    process.join()
    shards = finished_shards(out)
    build(raw, out)
    assert files(out) == files(tmp_path / "whole")
    assert finished_shards(out) == shards


def test_another_build_than_the_one_cut_short_is_refused_and_that_one_finished(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(raw, tmp_path / "whole")
    out = tmp_path / "out"

    def die() -> None:
        def replace(path: Path, target: Path) -> Path:
            if target == out / "manifest.json":
                os.kill(os.getpid(), signal.SIGKILL)
            return path.rename(target)

        monkeypatch.setattr(Path, "replace", replace)
        build(raw, out)

    started(die).join()
    assert not (out / "manifest.json").exists()
    assert (out / "shard-000000.tar").exists()
    with pytest.raises(UserError, match="finish it with `dist-pca shards merge`"):
        build_task(raw, out, 0)
    with pytest.raises(UserError, match="holds another build"):
        build(raw, out, unlabelled=True)
    assert files(out) == files(tmp_path / "whole")


def test_a_fixed_file_costs_its_own_shard_only(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole")
    image = raw / "images/013.png"
    content = image.read_bytes()
    image.write_bytes(content[:200])
    with pytest.raises(UserError, match=r"images/013\.png: .*; finished shards are kept \(6 of 12\)"):
        build(raw, tmp_path / "out")
    kept = finished_shards(tmp_path / "out")
    image.write_bytes(content)
    told: list[tuple[int, int, int]] = []
    build(raw, tmp_path / "out", progress=lambda *numbers: told.append(numbers))
    assert told[-1][:2] == (12, 12)
    assert kept.items() <= finished_shards(tmp_path / "out").items()
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_shards_of_another_build_are_not_taken(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole")
    (raw / "images/013.png").rename(tmp_path / "aside.png")
    (raw / "images/013.png").touch()
    with pytest.raises(UserError):
        build(raw, tmp_path / "out", unlabelled=True)
    (tmp_path / "aside.png").rename(raw / "images/013.png")
    build(raw, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_staged_tar_that_was_cut_is_written_again(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole")
    (raw / "labels/023.png").rename(tmp_path / "aside.png")
    (raw / "labels/023.png").touch()
    with pytest.raises(UserError):
        build(raw, tmp_path / "out")
    staged = sorted((tmp_path / "out/.building").glob("shard-*.tar"))
    staged[0].write_bytes(staged[0].read_bytes()[:-512])
    staged[1].with_suffix(".json").write_text("{")
    (tmp_path / "aside.png").rename(raw / "labels/023.png")
    build(raw, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_tasks_at_once_and_a_merge_are_one_build(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole")
    out = tmp_path / "out"
    tasks = [started(build_task, raw, out, task) for task in range(3)]
    for process in tasks:
        process.join()
        assert process.exitcode == 0
    assert [path.name for path in out.iterdir()] == [".building"]
    merge_parts(out)
    assert files(out) == files(tmp_path / "whole")
    once = finished_shards(out)
    assert merge_parts(out) == load_manifest(out)
    build_task(raw, out, 1)
    build(raw, out)
    assert finished_shards(out) == once


@pytest.mark.parametrize("tasks", [1, 5, 12, 20])
def test_any_number_of_tasks_in_any_order_is_one_build(raw: Path, tmp_path: Path, tasks: int) -> None:
    build(raw, tmp_path / "whole")
    order = list(range(tasks))
    random.Random(tasks).shuffle(order)
    for task in order:
        build_task(raw, tmp_path / "out", task, tasks)
    merge_parts(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_killed_task_goes_on_and_leaves_the_others_alone(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole")
    out = tmp_path / "out"
    build_task(raw, out, 0)
    for seconds in (0.01, 0.03, 0.05):
        before = finished_shards(out)
        process = started(build_task, raw, out, 1)
        time.sleep(seconds)
        process.kill()
        process.join()
        assert before.items() <= finished_shards(out).items()
    build_task(raw, out, 1)
    build_task(raw, out, 2)
    merge_parts(out)
    assert files(out) == files(tmp_path / "whole")


def test_a_merge_names_the_parts_that_are_missing(raw: Path, tmp_path: Path) -> None:
    build_task(raw, tmp_path / "out", 1)
    with pytest.raises(UserError, match=r"2 of 3 parts are not finished: --task 0 \(4 shards\), --task 2 \(4 shards\)"):
        merge_parts(tmp_path / "out")
    assert len(finished_shards(tmp_path / "out")) == 4


def test_parts_of_other_options_are_missing_until_built_again(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole")
    build_task(raw, tmp_path / "out", 0)
    build_task(raw, tmp_path / "out", 1)
    build_task(raw, tmp_path / "out", 2, unlabelled=True)
    with pytest.raises(UserError, match=r"--task 0 \(4 shards\), --task 1 \(4 shards\); run"):
        merge_parts(tmp_path / "out")
    kept = finished_shards(tmp_path / "out")
    build_task(raw, tmp_path / "out", 2)
    merge_parts(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len(kept.items() & finished_shards(tmp_path / "out").items()) == 8


def test_a_merge_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        merge_parts(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no parts in it; .*--task"):
        merge_parts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_task_beyond_the_last_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--task 3 --tasks 3: tasks are counted from 0"):
        build_task(raw, tmp_path / "out", 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda raw, out: build_task(raw, out, 0), "another process is running --task 0"),
        (lambda raw, out: build_task(raw, out, 1, unlabelled=True), "tasks with another recipe, other options"),
        (lambda raw, out: build_task(raw, out, 1, tasks=4), "another --tasks are running"),
        (lambda raw, out: build(raw, out), "another build is writing there"),
        (lambda raw, out: merge_parts(out), "another build is writing there"),
    ],
)
def test_what_a_task_at_work_would_be_disturbed_by_is_refused(
    raw: Path, tmp_path: Path, other: Callable[[Path, Path], None], message: str
) -> None:
    out = tmp_path / "out"
    build_task(raw, out, 0)
    with (out / ".building/lock").open() as whole, (out / ".building/task-0.lock").open() as task:
        fcntl.flock(whole, fcntl.LOCK_SH)
        fcntl.flock(task, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=message):
            other(raw, out)
        build_task(raw, out, 1)
    assert len(finished_shards(out)) == 8


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock, as some of Lustre are mounted."""

    def refuse(handle: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def paused(function: Callable[..., None], *arguments: Any, **options: Any) -> BaseProcess:
    """The call in a process that stops inside its first shard, with its locks held, until it is killed or continued."""

    def stop(samples: int, total: int, stored: int) -> None:
        if samples == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    process = started(function, *arguments, progress=stop, **options)
    os.waitid(os.P_PID, process.pid or 0, os.WSTOPPED)
    return process


def test_without_flock_builds_exclude_each_other_and_a_dead_ones_lock_is_taken_over(
    raw: Path, tmp_path: Path, no_flock: None
) -> None:
    out = tmp_path / "out"
    process = paused(build, raw, out)
    with pytest.raises(UserError, match=r"another build is writing there; wait until it ends .* or choose another"):
        build(raw, out)
    with pytest.raises(UserError, match=r"of another recipe, options or raw files; choose another --out"):
        build(raw, out, unlabelled=True)
    with pytest.raises(UserError, match="another build is writing there"):
        build_task(raw, out, 0)
    process.kill()
    process.join()
    build(raw, out)
    build(raw, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_without_flock_tasks_work_side_by_side(raw: Path, tmp_path: Path, no_flock: None) -> None:
    out = tmp_path / "out"
    process = paused(build_task, raw, out, 0)
    build_task(raw, out, 1)
    for other, message in (
        (lambda: build_task(raw, out, 0), "another process is running --task 0"),
        (lambda: build_task(raw, out, 1, tasks=4), "another --tasks are running"),
        (lambda: build(raw, out), "another build is writing there"),
    ):
        with pytest.raises(UserError, match=message):
            other()
    os.kill(process.pid or 0, signal.SIGCONT)
    process.join()
    build_task(raw, out, 2)
    merge_parts(out)
    build(raw, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_build_takes_over_what_tasks_have_finished(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole")
    build_task(raw, tmp_path / "out", 0)
    kept = finished_shards(tmp_path / "out")
    build(raw, tmp_path / "out")
    assert kept.items() <= finished_shards(tmp_path / "out").items()
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def damage(raw: Path, *numbers: int) -> None:
    for number in numbers:
        image = raw / f"images/{number:03d}.png"
        image.write_bytes(image.read_bytes()[:-300])


def test_skipped_samples_are_reported_and_change_no_other_shard(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path / "whole", on_error="skip")
    assert not (tmp_path / "whole/skipped.json").exists()
    damage(raw, 5, 8, 9)
    (raw / "labels/020.png").unlink()
    build(raw, tmp_path / "out", on_error="skip")
    report = json.loads((tmp_path / "out/skipped.json").read_text())
    assert [entry["image"] for entry in report] == [f"images/{number:03d}.png" for number in (5, 8, 9, 20)]
    assert report[0]["reason"].startswith("damaged image")
    assert report[3]["reason"] == "labels/020.*: no such file"
    assert str(tmp_path) not in json.dumps(report)
    whole, out = files(tmp_path / "whole"), files(tmp_path / "out")
    changed = {name for name in whole if whole[name] != out.get(name)}
    assert changed == {"manifest.json", *(f"shard-{number:06d}.tar" for number in (2, 4, 10))}
    assert "shard-000004.tar" not in out  # nothing was left of it
    assert load_manifest(tmp_path / "out").samples == 2 * SHARDS - 4


def test_skipping_shared_out_is_one_build(raw: Path, tmp_path: Path) -> None:
    damage(raw, 5, 8, 9)
    build(raw, tmp_path / "whole", on_error="skip", workers=1)
    for task in range(3):
        build_task(raw, tmp_path / "out", task, on_error="skip")
    merge_parts(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_more_than_half_skipped_is_an_error(raw: Path, tmp_path: Path) -> None:
    damage(raw, *range(SHARDS + 1))
    with pytest.raises(UserError, match=r"13 of 24 samples were skipped, more than half, the first images/000\.png"):
        build(raw, tmp_path / "out", on_error="skip")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]


def test_skipping_goes_on_from_a_build_that_failed_and_not_the_other_way_round(raw: Path, tmp_path: Path) -> None:
    damage(raw, 21)
    with pytest.raises(UserError):
        build(raw, tmp_path / "out")
    kept = finished_shards(tmp_path / "out")
    build_task(raw, tmp_path / "out", 0, 1, on_error="skip")
    assert kept.items() <= finished_shards(tmp_path / "out").items()
    with pytest.raises(UserError, match=r"images/021\.png"):
        build(raw, tmp_path / "out")
