"""Names are printed as they are, whatever rich would read in them."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

import dist_pca
from dist_pca.console import QUIET, counted, duration, paths_in_common, plain_console, print_error, print_warning
from dist_pca.train import LineHandler

NAMES = ["marking [/dashed]", "data/val[a]", "[red]", "[link=x]y[/link]", "\\[bold]", ":car:", "[", "{0}"]
PACKAGE = Path(dist_pca.__file__).parent


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stderr", [True, False])
def test_messages_titles_headings_and_cells_hold_names_as_they_are(
    name: str, stderr: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    plain_console(stderr=stderr).print(f"message {name}", table, style="red")
    printed = capsys.readouterr()
    assert (printed.err if stderr else printed.out).count(name) == 4


def test_every_console_of_the_package_is_made_in_one_place() -> None:
    made = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"(?<!def plain_console)(?<!\w)(?:Console\(|rich\.print|rich import print)", path.read_text())
    }
    assert made == {"console.py"}


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "dist_pca.cli", *arguments], capture_output=True, text=True)


def test_with_debug_an_error_has_its_traceback_and_without_it_one_line(tmp_path: Path) -> None:
    words = ("shards", "inspect", str(tmp_path / "nowhere"))
    plain, debugged = command(*words), command("--debug", *words)
    assert plain.returncode == debugged.returncode == 2
    assert plain.stderr.count("\n") == 1
    assert "Traceback" in debugged.stderr
    assert debugged.stderr.endswith(plain.stderr)


def test_with_quiet_results_warnings_and_errors_are_printed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(QUIET, "1")
    plain_console(stderr=True).print("progress")
    plain_console().print("result")
    print_error("wrong")
    print_warning("strange")
    handler = LineHandler()
    for level, text in ((logging.INFO, "news"), (logging.WARNING, "odd")):
        handler.emit(logging.LogRecord("dist_pca", level, "", 0, text, (), None))
    printed = capsys.readouterr()
    assert printed.out == "result\n"
    assert printed.err == "error: wrong\nwarning: strange\nodd\n"


def test_quiet_is_passed_on_to_every_process_that_a_command_starts() -> None:
    prints = "from dist_pca.cli import app; app(['--quiet', 'plan', '--help'], standalone_mode=False)"
    shows = "import os; print(os.environ['DIST_PCA_QUIET'])"
    done = subprocess.run([sys.executable, "-c", f"{prints}; {shows}"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("1\n")


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, "0 s"), (59.6, "1 min"), (3599, "59 min 59 s"), (3600, "1 h"), (200000, "2 d 7 h")]
)
def test_durations_have_two_units(seconds: float, written: str) -> None:
    assert duration(seconds) == written


@pytest.mark.parametrize(("number", "written"), [(0, "0 shards"), (1, "1 shard"), (1200, "1,200 shards")])
def test_things_are_counted_in_their_number(number: int, written: str) -> None:
    assert counted(number, "shard") == written


def test_shells_can_complete_commands() -> None:
    environment = {**os.environ, "_DIST_PCA_COMPLETE": "complete_bash", "COMP_WORDS": "dist-pca sh", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dist_pca.cli"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["shards"]


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a", "other/runs/a"], ["runs/a", "other/runs/a"]),
        (["/tmp/x/a", "/tmp/y/a", "/tmp/y/a"], ["x/a", "y/a", "y/a"]),
    ],
)
def test_paths_are_shortened_to_where_they_differ(paths: list[str], shown: list[str]) -> None:
    assert paths_in_common(paths) == shown
