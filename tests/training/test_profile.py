"""A trace holds the steps that were asked for, with their phases, and opens."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_pca.config import TelemetryConfig
from dist_pca.config.telemetry import profile_overrides
from dist_pca.errors import UserError
from dist_pca.training.phases import PhaseClock
from dist_pca.training.profile import Profile
from tests.training.alone import alone
from tests.training.test_phases import Watched


def traced(folder: Path, config: TelemetryConfig, steps: range) -> None:
    with alone(), PhaseClock(Watched(), torch.device("cpu")) as clock:  # type: ignore[arg-type]
        profile = Profile(config, folder, clock)
        profile.before(steps.start)
        for step in steps:
            clock.enter("forward", step)
            torch.ones(step, 2) @ torch.ones(2, 3)
            clock.enter("backward")
            profile.before(step + 1)
        profile.close()


def events(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return found


def test_a_trace_holds_the_steps_and_their_phases_and_the_log_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dist_pca.training"):
        traced(tmp_path, TelemetryConfig(profile_start=3, profile_steps=2), range(1, 9))
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-3-4.rank0.json.gz"
    assert any(str(file) in record.message for record in caplog.records)
    found = events(file)
    assert len([event for event in found if event["name"] == "forward"]) == 2
    products = [event["args"]["Input Dims"][0] for event in found if event["name"] == "aten::mm"]
    assert products == [[3, 2], [4, 2]]


def test_a_run_that_ends_within_the_trace_writes_what_there_is(tmp_path: Path) -> None:
    traced(tmp_path, TelemetryConfig(profile_start=4, profile_steps=9), range(3, 6))
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-4-5.rank0.json.gz"


@pytest.mark.parametrize("start", [None, 2])
def test_without_a_wish_and_after_its_steps_nothing_is_traced(tmp_path: Path, start: int | None) -> None:
    traced(tmp_path, TelemetryConfig(profile_start=start), range(3, 6))
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    with pytest.raises(UserError, match=r"rank0\.json\.gz: cannot be written"):
        traced(tmp_path, TelemetryConfig(profile_start=1, profile_steps=1), range(1, 3))


def test_the_command_lines_profile_names_steps() -> None:
    assert profile_overrides("100:5") == ["telemetry.profile_start=100", "telemetry.profile_steps=5"]
    with pytest.raises(UserError, match="--profile 100: write START:STEPS"):
        profile_overrides("100")
