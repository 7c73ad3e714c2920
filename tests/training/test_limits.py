"""A machine without room for a run is found out before anything is allocated."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dist_pca import cores
from dist_pca.config import RunConfig
from dist_pca.data.collate import SharedMemoryBuffer
from dist_pca.errors import UserError
from dist_pca.model.segmenter import build_segmenter
from dist_pca.shards.manifest import Manifest
from dist_pca.tools.doctor import machine
from dist_pca.training import limits
from dist_pca.training.limits import check_room, shared_memory_bytes
from tests.support.disk import small_disk
from tests.support.networks import run_config
from tests.support.shards import sample_members, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    return write_shards(tmp_path / "shards", [[sample_members(seed) for seed in range(4)]])


def config(shards: Manifest, *, workers: int = 2, crop: tuple[int, int] = (16, 16), **model: object) -> RunConfig:
    run = run_config(model=model)
    folder = str(shards.folder)
    data = run.data.model_copy(update={"workers": workers, "crop": crop, "source": folder, "target": folder})
    return run.model_copy(update={"data": data})


def test_the_bytes_are_those_of_the_loaders_buffers(shards: Manifest) -> None:
    run = config(shards)
    buffers = [SharedMemoryBuffer(2, 8, (16, 16), labelled=True) for _ in ("source", "target")]
    tensors = [part for buffer in buffers for part in (buffer.images, buffer.labels) if part is not None]
    assert all(part.is_shared() for part in tensors)
    assert shared_memory_bytes(run, [shards], [shards], None, 1) == sum(part.nbytes for part in tensors)
    assert shared_memory_bytes(run, [shards], [shards], None, 4) == sum(part.nbytes for part in tensors) // 4
    alone = SharedMemoryBuffer(0, 8, (16, 16), labelled=True)
    assert not alone.images.is_shared()


def test_more_bands_need_more_room(shards: Manifest) -> None:
    five = replace(shards, bands=5)
    buffer = SharedMemoryBuffer(2, 8, (16, 16), labelled=True, bands=5)
    assert buffer.labels is not None
    wanted = 2 * (buffer.images.nbytes + buffer.labels.nbytes)
    assert shared_memory_bytes(config(shards), [five], [five], None, 1) == wanted
    in_validation = (shared_memory_bytes(config(shards), [five], [five], other, 1) - wanted for other in (five, shards))
    assert next(in_validation) * 4 == next(in_validation) * 6
    rgb, many = (config(shards, crop=(40_000, 40_000), bands=bands) for bands in (3, 600))
    refused = []
    for run in (rgb, many):
        with pytest.raises(UserError, match=r"crops of 40000 x 40000 pixels on each rank take") as error:
            check_room(run, 0, 3, world_size=1, local_ranks=1)
        refused.append(float(re.findall(r"take ([\d,]+)\.", str(error.value))[0].replace(",", "")))
    assert refused[1] > 150 * refused[0]


def test_too_little_shared_memory_is_refused_with_both_sizes(
    shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "shm", "64k") as folder:
        monkeypatch.setattr(cores, "SHARED_MEMORY", folder)
        run = config(shards, workers=4)
        shared = shared_memory_bytes(run, [shards], [shards], None, 1)
        message = (
            r"^data\.workers: loader processes need 0\.4 MB .* /dev/shm has 0\.1 MB free; .*or set data\.workers=0$"
        )
        with pytest.raises(UserError, match=message):
            check_room(run, shared, 3, world_size=1, local_ranks=2)
        without = config(shards, workers=0)
        check_room(without, shared_memory_bytes(without, [shards], [shards], None, 1), 3, world_size=1, local_ranks=2)
        found = machine.shared_memory(run, 1)
        assert (found.verdict, found.remedy.endswith("or set data.workers=0")) == ("fail", True)
        assert machine.shared_memory(None, 1).verdict == "warn"


def test_validation_needs_room_too(shards: Manifest) -> None:
    run = config(shards)
    more = shared_memory_bytes(run, [shards], [shards], shards, 1) - shared_memory_bytes(
        run, [shards], [shards], None, 1
    )
    assert more == 2 * 2 * 4 * 24 * 40


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"workers": 100_000},
            r"^data\.workers: 200000 loader processes, .* are too many for \d+ cores; lower it to \d+ ",
        ),
        (
            {"crop": (100_000, 100_000), "workers": 0},
            r"^data\.crop: 16 crops of 100000 x 100000 pixels .* take [\d,.]+ GB",
        ),
        (
            {"head_channels": 10**9},
            r"^model: its weights on each rank take [\d,.]+ GB of memory, and [\d,.]+ GB are free",
        ),
        ({"head_channels": 10**14}, r"^model: a network of this size cannot be built \([^\n]*\)$"),
    ],
)
def test_sizes_beyond_the_machine_are_refused_in_a_line(
    shards: Manifest, keys: dict[str, object], message: str
) -> None:
    run = config(shards, **keys)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        check_room(run, 0, 3, world_size=1, local_ranks=1)


def test_ranks_of_a_machine_share_its_memory(shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(shards, workers=0, crop=(1, 1))
    weights = sum(4 * tensor.numel() for tensor in build_segmenter(run.model, 3).state_dict().values())
    large = config(shards, workers=0, crop=(512, 512))
    # Eight images of either domain over four ranks: bytes, labels too, and without a GPU the network's fp32.
    crops = 4 * 2 * (8 // 4) * 512 * 512 * (4 + (0 if torch.cuda.is_available() else 12))
    for each, key, needed in ((run, "model", weights), (large, "data.crop", crops // 4)):
        monkeypatch.setattr(limits, "available_memory", partial(int, 2 * max(needed, weights)))
        check_room(each, 0, 3, world_size=4, local_ranks=1)
        with pytest.raises(UserError, match=rf"^{key}: .* on each rank take [\d.]+ MB of memory for the 4 ranks of"):
            check_room(each, 0, 3, world_size=4, local_ranks=4)


def test_doctor_gives_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cores usable" in machine.memory().found
    monkeypatch.setattr(machine, "LEAST_MEMORY", 1e18)
    assert machine.memory().verdict == "warn"
