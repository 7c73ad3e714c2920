"""Lines of metrics.jsonl: exact means, one documented schema, the same whether a run is interrupted or not."""

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.classes import ClassInfo
from dist_pca.config import load_config
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.training import metrics as module
from dist_pca.training.metrics import METRIC_UNITS, METRICS, TIMING, MetricsLogger, Window
from dist_pca.training.profiling import PhaseClock
from tests.support.ranks import run_on_ranks
from tests.training.alone import alone
from tests.training.test_profiling import Watched

CPU = torch.device("cpu")
CLASSES = (ClassInfo("road", (0, 0, 0)), ClassInfo("sky", (1, 1, 1)))


def clock() -> PhaseClock:
    return PhaseClock(Watched(), CPU)  # type: ignore[arg-type]


def started(
    folder: Path,
    *overrides: str,
    start_step: int = 0,
    windows: Sequence[Window] = (),
    phases: PhaseClock | None = None,
) -> MetricsLogger:
    batches = ("training.source_batch=8", "training.target_batch=8", "objective.self_training.weight=0")
    # Two passes of the network for each pair of images.
    plain = (*batches, *(f"objective.association.teacher_{part}=false" for part in ("check", "weight", "matches")))
    config = load_config(resource("configs", "demo"), [f"output={folder}", "telemetry.trackers=[]", *plain, *overrides])
    config.folder.mkdir(exist_ok=True)
    phases = phases or clock()
    return MetricsLogger(config, CLASSES, phases, device=CPU, start_step=start_step, flops=1000, saved=list(windows))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "demo" / "metrics.jsonl").read_text().splitlines()]


def documented(levels: Sequence[str] = ("features", "predictions")) -> set[str]:
    names = (name for names in METRICS for name in names.split(", "))
    return {name.replace("LEVEL", level) for name in names for level in levels}


def steps(run: MetricsLogger, values: Sequence[Sequence[float]], first: int) -> None:
    """A step of each entry, with a micro-batch of each value in it."""
    for step, micro_batches in enumerate(values, first):
        for value in micro_batches:
            per_class = torch.tensor([int(value) if math.isfinite(value) else 0, 2])
            run.accumulate({"loss": torch.tensor(value, dtype=torch.float64), "kept_per_class_features": per_class}, ())
        run.log(step, {"learning_rate": 0.1}, skipped=step == 2)


def test_a_rate_that_grows_with_the_batch_is_named_in_the_printed_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = ("schedule.batch_scaling=sqrt", "schedule.base_batch=2")
    for more in ((), scaled):
        with alone(), started(tmp_path, "training.steps=1", *more) as run:
            steps(run, [(1,)], first=1)
        printed = capsys.readouterr().err
        assert "step 1/1  loss 1.000" in printed
        assert ("learning rate 0.1, sqrt in 8 images" in printed) == (more == scaled)


def test_a_line_has_means_over_all_micro_batches_of_what_is_finite(tmp_path: Path) -> None:
    with alone(), started(tmp_path, "training.steps=3", "training.log_every=2") as run:
        steps(run, [(1, 2), (6, math.nan), (math.inf, math.nan)], first=1)
    first, last = lines(tmp_path)
    assert (first["step"], first["loss"], first["skipped_share"]) == (2, 3.0, 0.5)
    assert first["kept_per_class_features"] == {"road": 9 / 4, "sky": 2}
    # The last step has a line of its own, and a mean of nothing is null.
    assert (last["step"], last["loss"], last["skipped_share"]) == (3, None, 0)


def test_a_value_for_each_pair_of_classes_is_named_by_both_and_zeros_are_left_out(tmp_path: Path) -> None:
    with alone(), started(tmp_path, "training.steps=2", "training.log_every=2") as run:
        for step in (1, 2):
            run.accumulate({"confusion_features": torch.tensor([[step, 0], [3, 0]])}, ())
            run.log(step, {}, skipped=False)
    (line,) = lines(tmp_path)
    assert line["confusion_features"] == {"road → road": 1.5, "sky → road": 3}


finite = st.floats(-(2.0**40), 2.0**40, allow_subnormal=False)


@settings(max_examples=40)
@given(
    values=st.lists(st.lists(finite | st.just(math.nan), min_size=2, max_size=2), min_size=2, max_size=12),
    log_every=st.integers(1, 5),
    max_pending=st.integers(1, 4),
    data=st.data(),
)
def test_a_run_interrupted_inside_a_log_window_has_the_lines_of_one_that_was_not(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[list[float]],
    log_every: int,
    max_pending: int,
    data: st.DataObject,
) -> None:
    stop = data.draw(st.integers(1, len(values) - 1))
    more_made = data.draw(st.integers(stop, len(values)))
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    overrides = (f"training.steps={len(values)}", f"training.log_every={log_every}")
    with alone(), mock.patch.object(module, "MAX_PENDING", max_pending):
        with started(whole, *overrides) as run:
            steps(run, values, first=1)
        with started(broken, *overrides) as run:
            steps(run, values[:stop], first=1)
            # As a checkpoint keeps it.
            windows = json.loads(json.dumps(run.state()))
            # Steps after the checkpoint are lost.
            steps(run, values[stop:more_made], first=stop + 1)
        with started(broken, *overrides, start_step=stop, windows=windows) as run:
            steps(run, values[stop:], first=stop + 1)
    expected, found = (
        [{name: value for name, value in line.items() if name not in TIMING} for line in lines(folder)]
        for folder in (whole, broken)
    )
    assert found == expected


def mean_of_two_ranks(rank: int, world_size: int, folder: str, windows: list[Window]) -> list[Any]:
    with started(Path(folder), "training.steps=2", "training.log_every=2", start_step=1, windows=windows) as run:
        steps(run, [[10.0 + rank]], first=2)
    return [rank]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_window_saved_on_another_number_of_ranks_counts_each_step_alike(tmp_path: Path) -> None:
    # Step 1 was made on three ranks, whose mean is 4; step 2 on two, whose mean is 10.5.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "demo").mkdir()
    windows = [{"loss": (value, 1)} for value in (2.0, 4.0, 6.0)]
    run_on_ranks(mean_of_two_ranks, 2, tmp_path, str(tmp_path / "run"), windows)
    (line,) = lines(tmp_path / "run")
    assert line["loss"] == pytest.approx((4 + 10.5) / 2)


def test_time_is_split_and_rates_follow_from_it(tmp_path: Path) -> None:
    phases = clock()
    with alone(), started(tmp_path, "training.steps=4", "training.log_every=4", phases=phases) as run:
        for step in range(1, 5):
            phases.enter("data", step)
            torch.rand(1000, 1000).sum()
            phases.enter("log")
            run.log(step, {}, skipped=False)
    (line,) = lines(tmp_path)
    assert set(line["seconds"]) == set(module.PHASES)
    assert sum(line["seconds"].values()) == pytest.approx(line["seconds_per_step"], rel=0.05)
    assert line["data_wait_share"] == pytest.approx(line["seconds"]["data"] / line["seconds_per_step"])
    assert line["images_per_second"] == pytest.approx(16 / line["seconds_per_step"])
    assert line["flops_per_second"] == pytest.approx(1000 * line["images_per_second"])
    assert line["flop_utilisation"] is None
    assert line["peak_memory_bytes"] > 1 << 20
    assert set(line) <= documented()


def test_a_log_file_ends_with_where_the_time_went(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    phases = clock()
    with alone(), started(tmp_path, "training.steps=3", "training.log_every=2", phases=phases) as run:
        phases.enter("association")
        phases.enter("communication")
        time.sleep(0.2)
        phases.enter("log")
        steps(run, [[1.0]] * 3, first=1)
        phases.enter("checkpoint")
        time.sleep(0.2)
    said = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in said[:2]] == ["step 2/3", "step 3/3"]
    assert re.fullmatch(
        r"steps 1 to 3 in 0\.0 min, \S+ s each, \S+ images/s: "
        r"association \d+%, of it communication \d+%.*checkpoint \d+%.*",
        said[2],
    )
    assert " 0%" not in said[2]
    assert len(said) == 3


def test_a_line_that_cannot_be_written_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "demo" / "metrics.jsonl").mkdir(parents=True)
    refused = pytest.raises(UserError, match=r"metrics\.jsonl: cannot")
    with alone(), started(tmp_path, "training.steps=1") as run, refused:
        steps(run, [[1.0]], first=1)


def test_units_are_those_of_documented_fields() -> None:
    assert set(METRIC_UNITS) <= set(METRICS)
