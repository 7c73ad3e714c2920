import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dist_pca
from dist_pca.cli import main
from tests.support.raw_data import make_folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["dist-pca", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_a_build_ends_with_a_table_of_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "raw", samples=5)
    build = ("shards", "build", "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    assert run(monkeypatch, *build, "--exclude", "*/004.png", "--samples-per-shard", 3) == 0
    printed = capsys.readouterr()
    assert all(word in printed.out for word in ("samples", "shards", "MB", "seconds", "images/s"))
    assert printed.out.splitlines()[-2].split()[1:4:2] == ["4", "2"]
    assert printed.err == ""


def test_the_same_build_says_that_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "raw")
    build = ("shards", "build", "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    assert run(monkeypatch, *build) == 0
    assert "already built" not in capsys.readouterr().out
    assert run(monkeypatch, *build) == 0
    assert "already built" in capsys.readouterr().out


def test_inspect_prints_tables_or_json_and_draws_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "raw")
    run(monkeypatch, "shards", "build", "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    capsys.readouterr()
    assert run(monkeypatch, "shards", "inspect", tmp_path / "out", "--grid", tmp_path / "grid.png") == 0
    assert "class 1" in capsys.readouterr().out
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert run(monkeypatch, "shards", "inspect", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4


@pytest.mark.parametrize("name", ["[red]x", "[/dashed]", "val[a]", ":car:", "[bold]a[/bold]"])
def test_a_name_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"name: a\ndata: {{source: '{name}', shorter_edge: [8, 8], crop: [8, 8]}}\nmodel: {{backbone: resnet18}}\n"
        "objective: {adapt: false}\ntraining: {steps: 1}\n"
    )
    assert run(monkeypatch, "train", tmp_path / "run.yaml") == 2
    assert f"shards {name}: no such folder" in capsys.readouterr().err
    run(monkeypatch, "doctor", tmp_path / "run.yaml")
    assert name in capsys.readouterr().out


def test_a_user_error_is_one_line_on_stderr_and_exits_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "[red]a folder whose name is long enough to be wrapped in a terminal of eighty columns[/red]"
    assert run(monkeypatch, "shards", "build", "gta5", "--root", root, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: root {root}: no such folder; give the folder that holds the raw data set\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_full_under_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "dist_pca.cli", "shards", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.match(r"error: the output cannot be written \(.*No space left", done.stderr)


def test_a_path_that_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "shards", "inspect", "x" * 300) == 2
    assert capsys.readouterr().err.startswith(f"error: {'x' * 300}: File name too long; correct the path")


def test_names_of_files_that_are_not_utf_8_are_printed_with_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "raw", samples=1)
    for folder in ("images", "labels"):
        (tmp_path / f"raw/{folder}/000.png").rename(tmp_path / f"raw/{folder}/caf\udce9.png")
    build = ("shards", "build", "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--dry-run")
    assert run(monkeypatch, *build) == 0
    assert "images/caf\\udce9.png" in capsys.readouterr().out


def test_an_unknown_recipe_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "shards", "build", "gta", "--root", tmp_path, "--out", tmp_path / "out") == 2
    assert "nearest is gta5" in capsys.readouterr().err


def test_an_interrupt_exits_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_pca.shards.build.build_shards", interrupt)
    assert run(monkeypatch, "shards", "build", "gta5", "--root", tmp_path, "--out", tmp_path / "out") == 130


def test_recipes_lists_what_is_shipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "shards", "recipes") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("gta5", "synthia", "cityscapes", "camvid", "folder", "train, val, test"))


@pytest.mark.parametrize("command", [(), ("shards",), ("shards", "build"), ("shards", "inspect")])
def test_help_is_there_for_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *command, "--help") == 0
    assert " ".join(("Usage: dist-pca", *command)) in capsys.readouterr().out


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == dist_pca.__version__


def test_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys; import dist_pca.cli; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "gta_to_cityscapes"), "the nearest is gta5_to_cityscapes"),
        (("train", "demo", "training.stepz=3"), "training.stepz: unknown key; the nearest is training.steps"),
        (("train", "demo", "--launcher", "accelerate/gpu"), "launch/accelerate/gpu: no such file"),
        (("train", "demo", "data.source=nowhere"), "shards nowhere: no such folder"),
        (("evaluate", "nowhere", "--shards", "nothing"), "nowhere: not a run folder"),
    ],
)
def test_wrong_words_end_with_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_evaluating_what_is_no_run_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "raw")
    assert run(monkeypatch, "shards", "build", "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out") == 0
    assert run(monkeypatch, "evaluate", tmp_path, "--shards", tmp_path / "out") == 2
    assert f"{tmp_path}: not a run folder" in capsys.readouterr().err
