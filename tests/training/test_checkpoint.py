"""Checkpoints are whole or absent, also where the disk is full."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dist_pca.errors import UserError
from dist_pca.training import checkpoint
from dist_pca.training.checkpoint import latest_checkpoint, save_checkpoint


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, and an engine whose partitions are the whole."""
    monkeypatch.setattr(checkpoint, "full_parameters", lambda engine: dict(engine.module.named_parameters()))
    monkeypatch.setattr(checkpoint, "full_optimizer_state", lambda engine: {"step": torch.tensor(1.0)})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, step: int, width: int) -> None:
    engine = SimpleNamespace(module=torch.nn.Linear(width, width).requires_grad_(False))
    save_checkpoint(engine, folder, step, seed=0, keep=2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_file_system(folder: Path) -> Iterator[Path]:
    """A megabyte of file system; only root may make one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


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
@pytest.mark.parametrize("limit", [full_file_system, file_size_limit])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path: Path, limit: object) -> None:
    if limit is full_file_system and os.getuid() != 0:
        pytest.skip("needs root")
    with limit(tmp_path / "disk") as folder:  # type: ignore[operator]
        save(folder, 1, width=16)
        with pytest.raises(UserError, match=r"step-00000002: cannot be written .*; step-00000001 is whole") as refused:
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
