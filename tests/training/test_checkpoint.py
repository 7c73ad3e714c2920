"""Checkpoints are whole or absent, also where the disk is full."""

import math
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import dist_pca
from dist_pca.config import RunConfig
from dist_pca.errors import UserError
from dist_pca.train import resolve_config
from dist_pca.training.checkpoint import (
    CheckpointPart,
    CheckpointWriter,
    latest_checkpoint,
    pointed_at,
    read_state,
)
from dist_pca.training.checkpoint_loading import check_files, has_ema, load_model
from dist_pca.training.checkpoint_parts import OptimizerPart, checkpoint_parts
from tests.support.disk import small_disk

CONFIG = resolve_config("demo", ["training.keep_checkpoints=2", "training.time_limit=1:00:00"])


@pytest.fixture
def alone() -> Iterator[None]:
    """One process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def engine(width: int) -> SimpleNamespace:
    """Holds a network of `width` squared weights, none of which train."""
    inner = SimpleNamespace(state={})
    optimizer = SimpleNamespace(single_partition_of_fp32_groups=[torch.zeros(1)], optimizer=inner)
    module = torch.nn.Linear(width, width).requires_grad_(False)
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 2)


def parts(engine: SimpleNamespace) -> list[CheckpointPart]:
    return checkpoint_parts(engine, None)


def writer(folder: Path) -> CheckpointWriter:
    return CheckpointWriter(folder, CONFIG, device=torch.device("cpu"))


def save(folder: Path, step: int, width: int, **state: object) -> None:
    with writer(folder) as checkpoints:
        checkpoints.save(parts(engine(width)), step, state=state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def file_size_limit(folder: Path) -> Iterator[Path]:
    """Files of a megabyte at most, which anybody may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("limit", [partial(small_disk, size="1m"), file_size_limit])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path: Path, limit: object) -> None:
    with limit(tmp_path / "disk") as folder:  # type: ignore[operator]
        save(folder, 1, width=16)
        with pytest.raises(UserError, match=r"step-00000002: cannot be written .*; step-00000001 is intact") as refused:
            save(folder, 2, width=1024)
        assert "\n" not in str(refused.value)
        assert names(folder) == ["latest", "step-00000001"]
        found = latest_checkpoint(folder)
        assert found is not None
        assert load_file(found / "model.safetensors")["weight"].shape == (16, 16)
        # Once there is room, the run goes on.
        save(folder, 2, width=16)
        assert names(folder) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.usefixtures("alone")
def test_the_newest_are_kept_and_what_a_killed_write_left_is_replaced(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f".step-{step:08d}.partial").mkdir(parents=True)
        save(tmp_path, step, width=4)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_tells_the_run_that_it_is_of(tmp_path: Path) -> None:
    save(tmp_path, 1, width=4)
    state = read_state(tmp_path / "step-00000001")
    assert RunConfig.model_validate(state["config"]) == CONFIG
    assert (state["step"], state["world_size"]) == (1, 1)
    assert state["code"].startswith(dist_pca.__version__)


@pytest.mark.usefixtures("alone")
def test_the_best_one_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, score in ((1, 0.2), (2, 0.4), (3, None), (4, 0.4), (5, 0.3), (6, math.nan)):
        save(tmp_path, step, width=4, mean_iou=score)
        best = pointed_at(tmp_path, "best")
        assert best is not None
        assert best.name == f"step-{min(step, 2):08d}"
    assert names(tmp_path) == ["best", "latest", "step-00000002", "step-00000005", "step-00000006"]


@pytest.mark.usefixtures("alone")
def test_what_others_keep_there_is_neither_removed_nor_overwritten(tmp_path: Path) -> None:
    for foreign in ("step-00000001.mine", "step-00000002", "step-1"):
        (tmp_path / foreign).mkdir()
    (tmp_path / "step-00000002" / "notes").write_text("mine")
    (tmp_path / "step-notes.txt").write_text("mine")
    for step in (1, 2, 3, 4):
        save(tmp_path, step, width=4)
    assert names(tmp_path) == [
        *("latest", "set-aside", "step-00000001.mine", "step-00000003", "step-00000004", "step-1", "step-notes.txt")
    ]
    assert (tmp_path / "set-aside" / "step-00000002" / "notes").read_text() == "mine"


@pytest.mark.usefixtures("alone")
def test_what_has_just_been_written_is_kept_even_below_others(tmp_path: Path) -> None:
    for step in (10, 11, 12, 3):
        save(tmp_path, step, width=4)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000011", "step-00000012"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"


@pytest.mark.usefixtures("alone")
def test_without_validation_none_is_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, width=4)
    assert pointed_at(tmp_path, "best") is None


@pytest.mark.usefixtures("alone")
def test_training_goes_on_while_a_checkpoint_is_written_and_hears_of_its_failure(tmp_path: Path) -> None:
    slow = threading.Event()

    def write(path: object, *_: object, metadata: dict[str, str]) -> None:
        slow.wait(10)
        raise OSError("the disk is gone")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="the disk is gone"):  # noqa: PT012
        patch.setattr("dist_pca.training.checkpoint.save_file", write)
        with writer(tmp_path) as checkpoints:
            assert checkpoints.save(parts(engine(8)), 1) < 5
            checkpoints.poll()
            slow.set()
            for _ in range(1000):
                checkpoints.poll()
                time.sleep(0.01)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.usefixtures("alone")
def test_what_is_saved_is_the_state_at_the_call_and_not_what_training_makes_of_it(tmp_path: Path) -> None:
    trained = engine(512)
    before = trained.module.weight.clone()
    with writer(tmp_path) as checkpoints:
        checkpoints.save(parts(trained), 1)
        trained.module.weight.zero_()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(load_file(found / "model.safetensors")["weight"], before)


KILLED = """
import sys
from pathlib import Path
import torch.distributed as dist
from tests.training.test_checkpoint import engine, parts, save, writer
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
save(Path(sys.argv[1]), 1, width=16)
with writer(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(parts(engine(8192)), 2)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_write_leaves_the_one_before(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    partial = tmp_path / ".step-00000002.partial"
    while not any(partial.glob("*")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert names(tmp_path) == [partial.name, "latest", "step-00000001"]
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert load_file(found / "model.safetensors")["weight"].shape == (16, 16)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(5, 4), r"other shapes: weight \[4, 4\] where the config has \[4, 5\]"),
        (torch.nn.Linear(4, 4, bias=False), "unexpected bias"),
        (torch.nn.BatchNorm1d(4), "missing num_batches_tracked, running_mean, running_var; other shapes: weight"),
        (
            torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),
            "missing 0.bias, 0.weight, 1.bias and 1 more",
        ),
    ],
)
def test_another_network_is_refused_with_the_tensors_that_differ(
    tmp_path: Path, model: torch.nn.Module, message: str
) -> None:
    save(tmp_path, 1, width=4)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(UserError, match=message):
        load_model(model, found)


@pytest.mark.usefixtures("alone")
def test_a_moving_average_that_a_checkpoint_does_not_have_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, width=4)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(UserError, match=r"has no moving average \(training.ema_decay was 0\)"):
        load_model(torch.nn.Linear(4, 4), found, ema=True)


@pytest.mark.usefixtures("alone")
def test_files_of_different_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    network = engine(2)
    with writer(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(parts(network), step)
    first, second = (tmp_path / f"step-{step:08d}" for step in (1, 2))
    check_files(second)
    own = (second / "model.safetensors").read_bytes()
    (second / "model.safetensors").write_bytes((first / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"step-00000002/model\.safetensors: is of another checkpoint than state\.json"):
        check_files(second)
    (second / "model.safetensors").write_bytes(own)
    (second / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"optimizer\.safetensors: missing; put it back, or point"):
        check_files(second)


def test_a_moving_average_that_has_been_removed_is_missing_and_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"step": 1, "files": ["model.safetensors", "ema.safetensors"]}')
    assert has_ema(tmp_path)
    with pytest.raises(UserError, match=r"ema\.safetensors: missing"):
        load_model(torch.nn.Linear(1, 1), tmp_path, ema=True)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("weight/momentum_buffer", "does not fit AdamW of this network, because of momentum_buffer"),
        ("weight/exp_avg", "does not fit AdamW of this network, because of bias"),
    ],
)
def test_another_optimisers_state_is_refused(tmp_path: Path, saved: str, message: str) -> None:
    save_file({saved: torch.zeros(4, 4)}, tmp_path / "optimizer.safetensors")
    module = torch.nn.Linear(4, 4)
    other = SimpleNamespace(module=module, optimizer=SimpleNamespace(optimizer=torch.optim.AdamW(module.parameters())))
    with pytest.raises(UserError, match=message):
        OptimizerPart(other).restore(tmp_path)
