from pathlib import Path

import pytest

from dist_pca.errors import UserError
from dist_pca.files import new_folder
from tests.support.ranks import run_on_ranks


def write_on_rank(rank: int, world_size: int, out: Path) -> int:
    with new_folder(out, "--out") as staged:
        (staged / f"{rank}.txt").write_text("x")
    return len(list(out.iterdir()))


def test_the_folder_appears_with_all_that_was_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with new_folder(out, "--out") as staged:
        (staged / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    def fail_halfway() -> None:
        with new_folder(tmp_path / "out", "--out") as staged:
            (staged / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("x")
    with new_folder(tmp_path / "out", "--out") as staged:
        (staged / "file").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_an_empty_folder_is_taken_and_a_full_one_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", "--out") as staged:
        (staged / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"^--out .*empty: exists already"),
        new_folder(tmp_path / "empty", "--out"),
    ):
        pytest.fail("the body ran")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"^--out .*: cannot be written .*give another folder$"),
        new_folder(tmp_path / "file" / "out", "--out"),
    ):
        pytest.fail("the body ran")


def test_ranks_write_into_one_folder(tmp_path: Path) -> None:
    run_on_ranks(write_on_rank, 2, tmp_path, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.txt", "1.txt"]
