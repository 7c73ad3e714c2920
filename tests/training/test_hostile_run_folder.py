"""Whatever the files of a run folder hold, a start goes on or is refused in one line that names a file."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig, load_config
from dist_pca.errors import UserError
from dist_pca.files import FORMAT, drop_lines_after, write_record
from dist_pca.resilience.exit_status import read_exit_status, write_exit_status
from dist_pca.resources import resource
from dist_pca.tools.cluster.status import read_status
from dist_pca.training.checkpoint import latest_checkpoint, read_state
from dist_pca.training.run_folder import RunData, check_resume, log_launch, read_launch_log, read_run
from tests.support.nasty import NASTY, STEPS, few_or_many, replaced

STATE = {
    "step": 4,
    "world_size": 2,
    "code": "0.0.0+abc",
    "mean_iou": 0.5,
    "loss_scale": 2.0,
    "loss_scale_steps": 3,
    "non_finite_steps": 1,
    "windows": [{"loss": [1.0, 2.0]}, {"loss": [3.0, 2.0]}],
}
CLASSES = (ClassInfo("road", (1, 2, 3)), ClassInfo("marking [/dashed]", (4, 5, 6)))
JSON_FILES = ("classes.json", "data.json", "exit.json", "checkpoints/step-00000004/state.json", "metrics.jsonl")
FILES = (*JSON_FILES, "config.yaml", "starts.jsonl", "checkpoints/latest")


@cache
def plain_config() -> RunConfig:
    return load_config(resource("configs", "demo"), ["name=run"])


def run_config(folder: Path) -> RunConfig:
    return plain_config().model_copy(update={"output": str(folder)})


def write_run(folder: Path) -> Path:
    """The files of a run of four steps that a start reads before it trains."""
    config = run_config(folder)
    run = config.folder
    checkpoint = run / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    # JSON is YAML. Reading all keys, most of them at their defaults, would take most of the time of these tests.
    (run / "config.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_defaults=True)))
    write_record(checkpoint / "state.json", {**STATE, "config": config.model_dump(mode="json")})
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    (run / "classes.json").write_text(json.dumps([{"name": info.name, "color": info.color} for info in CLASSES]))
    shards = {"folder": "data/day", "samples": 4, "sha256": "0" * 64}
    write_record(run / "data.json", {"source": [shards], "target": [shards]})
    write_exit_status(run, 75, "saved")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 1.0, "seconds": {"data": 1.0}}) + "\n")
    log_launch(run, 0, 2, {})
    return run


def start(run: Path) -> list[str]:
    """Read a run folder in every way in which a start, `status` and `evaluate` do; returns what was refused."""
    config = run_config(run.parent)
    checkpoint = run / "checkpoints" / "step-00000004"
    readers: tuple[Callable[[], object], ...] = (
        lambda: check_resume(config, True, RunData(CLASSES, (), ())),
        lambda: read_run(run),
        lambda: latest_checkpoint(run / "checkpoints"),
        lambda: read_state(checkpoint),
        lambda: read_launch_log(run),
        lambda: read_exit_status(run),
        lambda: read_status(run),
        lambda: drop_lines_after(run / "metrics.jsonl", 4),
    )
    refused = []
    for read in readers:
        try:
            read()
        except UserError as error:
            refused.append(str(error))
    return refused


def test_a_whole_run_is_refused_nowhere(tmp_path: Path) -> None:
    assert start(write_run(tmp_path)) == []


@few_or_many(25, 2000)
def test_a_value_of_any_other_kind_is_refused_in_a_line_or_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    @settings(max_examples=examples)
    @given(file=st.sampled_from(JSON_FILES), steps=STEPS, value=NASTY)
    def check(file: str, steps: list[int], value: object) -> None:
        run = write_run(tmp_path_factory.mktemp("run"))
        whole = json.loads((run / file).read_text())
        (run / file).write_text(json.dumps(replaced(whole, steps, value)) + "\n")
        check_start(run)

    check()


def check_start(run: Path) -> None:
    """Check that a start is refused nowhere, or in short lines that name the run's file."""
    for message in start(run):
        assert "\n" not in message
        assert str(run) in message
        assert len(message) < 1000


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"\xff\xfe{",
        b"[" * 50_000,
        b"{}",
        b"[]",
        b"1",
        b'"x"',
        b'{"step": 1e999}',
        b"9" * 5000,
        b"../" * 2000,
    ],
    ids=["empty", "zero", "encoding", "nested", "object", "list", "number", "text", "infinite", "digits", "path"],
)
def test_bytes_of_any_kind_are_refused_in_a_line_or_do_no_harm(tmp_path: Path, file: str, content: bytes) -> None:
    run = write_run(tmp_path)
    (run / file).write_bytes(content)
    check_start(run)


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("checkpoints/step-00000004/state.json", {"step": "four"}, "step: expected a whole number, got 'four'"),
        ("checkpoints/step-00000004/state.json", {"step": -1}, "step: Input should be greater than or equal to 0"),
        ("data.json", {"source": [{"folder": "a", "samples": 1}]}, r"source\.0\.sha256: required and missing"),
        ("data.json", {"version": FORMAT + 1}, f"a newer dist-pca wrote it, in format {FORMAT + 1}.*update dist-pca"),
    ],
)
def test_the_field_that_is_wrong_is_named_with_a_remedy(
    tmp_path: Path, file: str, spoil: dict[str, object], message: str
) -> None:
    run = write_run(tmp_path)
    (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | spoil))
    assert re.search(message, start(run)[0])


@pytest.mark.parametrize("name", ["../other/step-00000004", "step-00000004/", "/etc/step-00000004", "step-4"])
def test_latest_names_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path)
    other = run / "other" / "step-00000004"
    other.mkdir(parents=True)
    (other / "state.json").write_text(json.dumps(STATE))
    (run / "checkpoints" / "latest").write_text(name)
    with pytest.raises(UserError, match="is not a checkpoint"):
        latest_checkpoint(run / "checkpoints")


def test_a_file_of_the_first_release_has_no_version_and_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for file in ("data.json", "exit.json", "checkpoints/step-00000004/state.json"):
        values = json.loads((run / file).read_text())
        assert values.pop("version") == FORMAT
        (run / file).write_text(json.dumps(values))
    assert start(run) == []
    assert read_exit_status(run) is not None
