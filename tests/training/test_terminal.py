"""A run on a terminal is a live view that no process garbles; elsewhere it is plain lines."""

import json
import os
import signal
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_pca.config import load_config
from dist_pca.console import QUIET, print_error
from dist_pca.resilience.exit_status import exit_process
from dist_pca.resources import resource
from dist_pca.training import terminal as module
from dist_pca.training.profiling import PhaseClock
from dist_pca.training.terminal import RunTerminal
from tests.support.terminals import Shown, on_terminal
from tests.training.test_profiling import Watched

FRAME = 0.02
LONG = "a message of another rank that is longer than one row of a terminal, and says what to do about it; start again"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_FRAMES", FRAME)


def record(step: int, **more: object) -> dict[str, Any]:
    terms = {name: 1.0 + place for place, name in enumerate(module.SUMMARY_TERMS)}
    ratios = {"kept_ratio_features": 0.34, "cover_ratio_features": 0.8}
    rates = {"images_per_second": 26.12, "flop_utilisation": 0.31, "seconds_per_step": 60.0}
    return {"step": step, **terms, **ratios, **rates, **more}


def run(folder: Path, act: Callable[[RunTerminal, PhaseClock], object], start_step: int = 0) -> None:
    clock = PhaseClock(Watched(), torch.device("cpu"))  # type: ignore[arg-type]
    config = load_config(resource("configs", "demo"), [f"output={folder}", "training.steps=40"])
    with RunTerminal(config, clock, start_step) as terminal:
        act(terminal, clock)


def train(terminal: RunTerminal, clock: PhaseClock) -> None:
    for step, score in ((10, 0.25), (20, 0.5), (30, 0.375)):
        terminal.print_record(record(step, validation_mean_iou=score))
        time.sleep(3 * FRAME)


def shown(folder: Path, act: Callable[[RunTerminal, PhaseClock], object] = train, **terminal: Any) -> Shown:
    return on_terminal(lambda: run(folder, act), **terminal)


def test_steps_between_records_are_shown(tmp_path: Path) -> None:
    def act(terminal: RunTerminal, clock: PhaseClock) -> None:
        train(terminal, clock)
        clock.enter("data", 36)
        time.sleep(3 * FRAME)

    assert "step 35/40" in "\n".join(shown(tmp_path, act).screen.rows)


@pytest.mark.parametrize(("columns", "fits"), [(200, 80), (80, 80), (40, 40)])
def test_every_row_fits_80_columns_and_the_terminal(tmp_path: Path, columns: int, fits: int) -> None:
    seen = shown(tmp_path, columns=columns)
    assert seen.status == 0
    assert not seen.screen.wrapped
    assert fits - 10 < max(map(len, seen.screen.rows)) <= fits


def test_the_view_has_progress_speed_losses_and_validations_and_stays_when_training_ends(tmp_path: Path) -> None:
    screen = shown(tmp_path).screen
    text = "\n".join(screen.rows)
    for part in ("step 30/40", "10 min left", "60 s per step", "26.1 images/s", "31% of peak", "loss 1.000"):
        assert text.count(part) == 1, text
    assert "validation mIoU 37.5 in step 30, best 50.0 in step 20" in text
    assert (screen.row, screen.column) == (len(screen.rows) - 1, 0)
    assert len(screen.rows) <= 8


def test_validations_before_a_resumed_run_count_for_the_best(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "metrics.jsonl").write_text(json.dumps(record(5, validation_mean_iou=0.75)) + "\n")
    assert "best 75.0 in step 5" in "\n".join(shown(tmp_path).screen.rows)


def test_the_phase_that_lasts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_PHASE_SECONDS", 5 * FRAME)

    def validate(terminal: RunTerminal, clock: PhaseClock) -> None:
        for _ in range(12):
            # As the progress of a validation does for each image.
            clock.enter("validation")
            time.sleep(FRAME)

    assert "validating" in "\n".join(shown(tmp_path, validate).screen.rows)
    assert "validating" not in shown(tmp_path, lambda _, clock: clock.enter("validation")).output


def test_a_line_of_another_process_stands_whole_above_the_view(tmp_path: Path) -> None:
    def act(terminal: RunTerminal, clock: PhaseClock) -> None:
        train(terminal, clock)
        os.write(2, b"killed by another process\n")
        time.sleep(3 * FRAME)

    rows = shown(tmp_path, act).screen.rows
    assert "killed by another process" in rows
    assert sum("step 30/40" in row for row in rows) == 1


def test_an_error_is_not_mixed_with_the_view_which_a_hard_exit_removes(tmp_path: Path) -> None:
    def act(terminal: RunTerminal, clock: PhaseClock) -> None:
        train(terminal, clock)
        print_error(LONG)
        exit_process(None, 69)

    seen = shown(tmp_path, act)
    assert seen.status == 69
    assert "".join(seen.screen.rows) == f"error: {LONG}"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_cursor_stays_visible_at_the_start_of_a_row_however_a_run_ends(tmp_path: Path, number: int) -> None:
    def act(terminal: RunTerminal, clock: PhaseClock) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(terminal, clock)
        os.kill(os.getpid(), number)
        time.sleep(30)

    seen = shown(tmp_path, act)
    assert seen.status in (-number, 1)
    assert seen.screen.cursor_visible
    assert "?25l" not in seen.output
    assert seen.screen.column == 0
    assert seen.screen.rows[seen.screen.row] == ""


def test_an_exception_is_printed_below_the_view(tmp_path: Path) -> None:
    def act(terminal: RunTerminal, clock: PhaseClock) -> None:
        train(terminal, clock)
        raise RuntimeError("broken")

    def scene() -> None:
        try:
            run(tmp_path, act)
        except RuntimeError as error:
            os.write(2, f"{error}\n".encode())

    rows = on_terminal(scene).screen.rows
    assert rows[-2:] == ["broken", ""]
    assert any("step 30/40" in row for row in rows[:-2])


@pytest.mark.timeout(60)
def test_a_terminal_whose_output_is_stopped_holds_no_step(tmp_path: Path) -> None:
    def act(terminal: RunTerminal, clock: PhaseClock) -> None:
        termios.tcflow(2, termios.TCOOFF)
        train(terminal, clock)

    assert shown(tmp_path, act).status == 0


def test_no_color_leaves_out_colours_alone(tmp_path: Path) -> None:
    assert shown(tmp_path).screen.colours
    plain = shown(tmp_path, NO_COLOR="1").screen
    assert not plain.colours
    assert any("step 30/40" in row for row in plain.rows)


def test_a_terminal_without_a_cursor_gets_plain_lines(tmp_path: Path) -> None:
    output = shown(tmp_path, TERM="dumb").output
    assert "\x1b" not in output
    assert [line.split("  ")[0] for line in output.splitlines()] == ["step 10/40", "step 20/40", "step 30/40"]


def test_quiet_shows_nothing(tmp_path: Path) -> None:
    assert shown(tmp_path, train, **{QUIET: "1"}).output == ""


@pytest.mark.parametrize("forced", [False, True])
def test_a_log_file_has_a_plain_line_for_each_record(
    tmp_path: Path, forced: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    run(tmp_path, train)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("step 30/40  loss 1.000  ce 2.000")
    assert lines[-1].endswith("validation mIoU 37.5  26.1 images/s  31% of peak  10 min left")
