"""A real terminal for a test: a pseudoterminal, and the screen that its output draws."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

_TOKENS = re.compile(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])|(\r|\n)|([^\x1b\r\n])")


class Screen:
    """What a terminal shows after an output, without its upper end: rows never scroll away."""

    def __init__(self, output: str, columns: int) -> None:
        self.rows = [""]
        self.row = self.column = 0
        self.cursor_visible, self.wrapped = True, False
        self.colours: set[str] = set()
        end = 0
        for token in _TOKENS.finditer(output):
            assert token.start() == end, repr(output[end : end + 20])
            end = token.end()
            self._apply(token, columns)
        assert end == len(output), repr(output[end : end + 20])

    def _apply(self, token: "re.Match[str]", columns: int) -> None:
        number, code, control, char = token.groups()
        if char is not None:
            if self.column == columns:
                self.wrapped, self.column = True, 0
                self._down()
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[: self.column] + char + row[self.column + 1 :]
            self.column += 1
        elif control == "\n":
            self._down()
        elif control == "\r":
            self.column = 0
        elif code == "m":
            self.colours |= {part for part in (number or "0").split(";") if part[0] in "349" and len(part) > 1}
        elif code == "J" and number == "":
            self.rows[self.row :] = [self.rows[self.row][: self.column]]
        elif code == "A":
            self.row = max(0, self.row - int(number or 1))
        elif number == "?25":
            self.cursor_visible = code == "h"
        else:
            raise AssertionError(f"a control sequence that this screen does not have: {number}{code}")

    def _down(self) -> None:
        self.row += 1
        self.rows += [""] * (self.row == len(self.rows))


class Shown(NamedTuple):
    """How a process on a terminal ended, and what is on the screen then."""

    status: int
    """Its exit code, or the negative number of the signal that killed it."""
    screen: Screen
    output: str


def set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def read_until_closed(descriptor: int) -> str:
    output = b""
    # Linux reports the end of a pseudoterminal as an error.
    with suppress(OSError):
        while block := os.read(descriptor, 1 << 16):
            output += block
    return output.decode()


def on_terminal(scene: Callable[[], object], *, columns: int = 80, rows: int = 24, **environment: str) -> Shown:
    """Run a scene in a forked process whose standard streams are a terminal."""
    child, descriptor = pty.fork()
    if child == 0:
        status = 1
        try:
            set_size(2, columns, rows)
            for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
                os.environ.pop(name, None)
            os.environ.update({"TERM": "xterm-256color"} | environment)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            scene()
            status = 0
        finally:
            os._exit(status)
    output = read_until_closed(descriptor)
    os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Shown(status, Screen(output, columns), output)
