import io
import sys
import time

import pytest

from dist_pca.shards.progress import shown_progress


def test_without_a_terminal_there_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with shown_progress("images") as tell:
        for done, stored in ((0, 0), (1500, 10**9), (1600, 10**9), (2100, 2 * 10**9)):
            tell(done, 3000, stored)
    assert capsys.readouterr().err.splitlines() == [
        "1,500 of 3,000 images, 150 images/s, 100.0 MB/s, 10 s left",
        "2,100 of 3,000 images, 100 images/s, 95.2 MB/s, 9 s left",
    ]


def test_on_a_terminal_there_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown_progress("images") as tell:
        tell(0, 3, 0)
        tell(3, 3, 100)
    assert "3/3" in terminal.getvalue()
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[2K")
