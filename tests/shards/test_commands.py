import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_pca.cli import main
from dist_pca.console import QUIET
from dist_pca.resources import resource
from dist_pca.shards.recipe import load_recipe
from tests.support.foreign_shards import sample, write
from tests.support.raw_data import make_folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    make_folder(tmp_path / "raw", samples=6)
    return tmp_path / "raw"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run `dist-pca shards` and return its exit code."""
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["dist-pca", "shards", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    return call


def _build(raw: Path, out: Path) -> tuple[object, ...]:
    return ("build", "folder", "--root", raw, "--out", out, "--workers", 1, "--samples-per-shard", 2)


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, raw: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(*_build(raw, tmp_path / "out"), "--dry-run") == 0
    # Lines break where the folder's path is long.
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("3, each of 2 samples", "images/000.png", "labels/004.png", "class 2", "nothing is written"):
        assert word in printed
    assert "images/005.png" not in printed  # only the first ones
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_skipped_samples_are_a_table_and_a_warning(run, raw: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (raw / "images/003.png").write_bytes(b"nonsense")
    assert run(*_build(raw, tmp_path / "out"), "--on-error", "skip") == 0
    printed = capsys.readouterr()
    assert "images/003.png" in printed.err
    assert "unreadable image" in printed.err
    assert printed.err.splitlines()[-1] == "warning: 1 of 6 samples were skipped"
    assert printed.out.splitlines()[-2].split()[1] == "5"


def test_parts_are_built_and_merged(run, raw: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    for task in (1, 0):
        assert run(*_build(raw, tmp_path / "out"), "--task", task, "--tasks", 2) == 0
        # The title breaks where the folder's path is long.
        assert f"task {task} of 2" in " ".join(capsys.readouterr().out.split())
    assert run("merge", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: 6 samples in 3 shards\n"
    assert run("merge", tmp_path / "out") == 0
    assert run(*_build(raw, tmp_path / "out"), "--task", 0) == 2
    assert "--task and --tasks must be given together" in capsys.readouterr().err


def test_verify_exits_with_one_where_there_are_problems(run, raw: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(*_build(raw, tmp_path / "out")) == 0
    capsys.readouterr()
    verify = ("verify", tmp_path / "out", "--deep", "--workers", 1)
    assert run(*verify) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/out: no problem in 6 samples, 3 shards, ")
    (tmp_path / "out/shard-000001.tar").unlink()
    (tmp_path / "out/shard-000007.tar").touch()
    assert run(*verify) == 1
    printed = capsys.readouterr().out
    assert "shard-000001.tar" in printed
    assert ": 2 problems in 6 samples" in printed.splitlines()[-1]
    assert run(*verify, "--json") == 1
    assert [entry["file"] for entry in json.loads(capsys.readouterr().out)["problems"]] == [
        "shard-000001.tar",
        "shard-000007.tar",
    ]
    assert run("verify", tmp_path / "nowhere") == 2


def test_index_makes_a_folder_that_inspect_draws(run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = write(tmp_path / "theirs", [sample(f"{number}", "seg.png") for number in range(3)])
    index = ("index", folder, "--label-set", "cityscapes_19", "--label-member", "seg.png", "--workers", 1)
    assert run(*index) == 0
    assert capsys.readouterr().out == f"{folder}: 3 samples in 2 shards, labels in seg.png\n"
    assert run("index", folder, "--force", "--workers", 1) == 0
    assert capsys.readouterr().out.endswith("no labels in label.png (the first sample has jpg, seg.png)\n")
    assert run(*index, "--force") == 0
    assert run("inspect", folder, "--grid", tmp_path / "grid.png") == 0
    assert "sidewalk" in capsys.readouterr().out
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_check_exits_with_one_where_a_build_would_refuse(run, raw: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    check = ("check", raw, "--recipe", "folder", "--workers", 1)
    assert run(*check) == 0
    assert capsys.readouterr().out.endswith(f"{raw}: no problem in 6 images\n")
    (raw / "images/002.png").write_bytes(b"nonsense")
    assert run(*check) == 1
    printed = capsys.readouterr().out
    assert "images/002.png" in printed
    assert printed.endswith(f"{raw}: 1 problem in 6 images\n")
    assert run(*check, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [entry["file"] for entry in found["problems"]] == ["images/002.png"]
    assert found["splits"][0]["images"] == 6


def test_names_are_printed_as_they_are(run, raw: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (raw / "classes.yaml").write_text(
        "".join(f"- {{name: {n}, color: [1, 2, 3]}}\n" for n in ("'[/a]'", "'[red]'", "c"))
    )
    (raw / "images/005.png").rename(raw / "images/[bold]5[x].png")
    (raw / "labels/005.png").rename(raw / "labels/[bold]5[x].png")
    (raw / "images/004.png").write_bytes(b"nonsense")
    (raw / "images/000.png").unlink()
    recipe = tmp_path / "[b]mine.yaml"
    text = resource("shards", "folder").read_text()
    recipe.write_text(text.replace("name: folder", "name: '[red]own[/i]'"))
    out = tmp_path / "val[a]"
    arguments = (recipe, "--root", raw, "--out", out, "--workers", 1, "--on-error", "skip")
    assert run("build", *arguments, "--dry-run") == 0
    planned = capsys.readouterr().out
    for name in ("[red]own[/i], version 1", "images/[bold]5[x].png", "[/a]", "[red]", "val[a]"):
        assert name in planned
    assert run("build", *arguments) == 0
    assert "val[a]" in capsys.readouterr().out
    assert run("inspect", out) == 0
    shown = capsys.readouterr().out
    for name in ("[/a]", "[red]", "val[a]", "[red]own[/i], version 1"):
        assert name in shown
    (out / "shard-[x].tar").touch()
    assert run("verify", out, "--deep", "--workers", 1) == 1
    assert "shard-[x].tar" in capsys.readouterr().out
    assert run("check", raw, "--recipe", recipe, "--workers", 1) == 1
    assert "[/a]" in capsys.readouterr().out


def test_a_shipped_recipe_is_printed_to_start_from(run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run("recipes", "folder") == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("folder")
    assert run("recipes", "nowhere") == 2


def test_a_class_without_a_pixel_is_a_warning(run, raw: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    with (raw / "classes.yaml").open("a") as file:
        file.write("- {name: never, color: [1, 2, 3]}\n")
    assert run(*_build(raw, tmp_path / "out")) == 0
    assert "warning: shards " in capsys.readouterr().err
    assert run("index", tmp_path / "out", "--force", "--classes", raw / "classes.yaml", "--workers", 1) == 0
    assert "no label has a pixel of never;" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["recipes", "check", "build", "merge", "verify", "index", "inspect"])
def test_help_is_there_for_every_command(run, command: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(command, "--help") == 0
    assert f"Usage: dist-pca shards {command}" in capsys.readouterr().out


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(run, raw: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    # 20 kB a file: enough for the small shards, not for the large last one.
    from PIL import Image

    from tests.support.raw_data import random_image, save

    save(random_image(0, 100, 100), raw / "images/005.png")
    save(Image.new("L", (100, 100)), raw / "labels/005.png")
    code = (
        "import resource; from dist_pca.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); main()"
    )
    command = [sys.executable, "-c", code, "shards", *map(str, _build(raw, out))]
    # A slow build prints its progress, if it is not to be quiet.
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", QUIET: "1"}
    ended = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "build stopped: [Errno 27]" in line
    assert line.endswith("; finished shards are kept (2 of 3), building again resumes from there")
    assert not list(out.glob(".building/*.part"))
    assert not list(out.glob("*"))[1:]
    assert run(*_build(raw, out)) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        *(f"shard-{number:06d}.tar" for number in range(3)),
    ]
