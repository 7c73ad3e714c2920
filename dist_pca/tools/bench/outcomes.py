"""A pytest plugin that writes each test's outcome to a file as soon as it is known.

A run that is cut off leaves the outcomes so far, and the test that was running. Run with
`pytest -p dist_pca.tools.bench.outcomes`; the environment variable `DIST_PCA_OUTCOMES` names the file.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

OUTCOMES_FILE = "DIST_PCA_OUTCOMES"
"""Environment variable that names the file."""
_LONGEST = 600
"""Characters kept of what a failing test reports."""


Outcomes = dict[Literal["passed", "failed", "skipped", "unfinished"], dict[str, str]]
"""What each test came to, by its name: how long it took, what it reported, why it was skipped, or nothing."""


def pytest_runtest_logstart(nodeid: str, location: object) -> None:
    """Note that a test begins."""
    _append({"test": nodeid, "outcome": "unfinished", "about": ""})


def pytest_runtest_logreport(report: Any) -> None:
    """Note what a test, its set-up or its tear-down came to."""
    if report.when == "call" or report.outcome != "passed":
        _note(report, f"{getattr(report, 'duration', 0):.1f} s")


def pytest_collectreport(report: Any) -> None:
    """Note a file that cannot be imported, or is skipped as a whole."""
    if report.outcome != "passed":
        _note(report, "")


def read_outcomes(file: Path) -> Outcomes:
    """Read what the plugin has written, also while tests run; nothing where there is no file."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    found: dict[str, dict[str, str]] = {}
    for line in map(json.loads, lines):
        # A test that fails stays failed, whatever its tear-down does.
        if found.get(line["test"], {}).get("outcome") != "failed":
            found[line["test"]] = line

    outcomes: Outcomes = {"passed": {}, "failed": {}, "skipped": {}, "unfinished": {}}
    for test, line in found.items():
        outcomes[line["outcome"]][test] = line["about"]  # type: ignore[index]
    return outcomes


def _note(report: Any, took: str) -> None:
    # A skipped test reports where it was skipped, and why.
    about = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or took)
    about = about.removeprefix("Skipped: ")[-_LONGEST:]
    _append({"test": report.nodeid, "outcome": report.outcome, "about": about})


def _append(line: dict[str, str]) -> None:
    with Path(os.environ[OUTCOMES_FILE]).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
