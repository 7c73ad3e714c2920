import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_pca.classes import ClassInfo
from dist_pca.data.collate import Batch
from dist_pca.data.stream import EvaluationSample, evaluation_stream, stream
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest
from tests.support.shards import CLASSES, data_config, make_shards, png, sample_members, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("labelled") / "shards", [5, 4, 6])


@pytest.fixture(scope="module")
def evaluated(manifest: Manifest) -> list[EvaluationSample]:
    return list(evaluation_stream(manifest, 0, 1, classes=CLASSES, workers=0))


def start(manifest: Manifest, keys: dict[str, Any] | None = None, **arguments: Any) -> Generator[Batch, None, None]:
    defaults = {
        "domain": "source",
        "seed": 3,
        "rank": 0,
        "world_size": 1,
        "global_batch": 4,
        "accumulation": 1,
        "start_step": 0,
    }
    return stream(data_config(**keys or {}), [manifest], **{**defaults, **arguments})


def take(batches: Generator[Batch, None, None], count: int) -> list[Batch]:
    taken = list(islice(batches, count))
    batches.close()
    return taken


def samples(batches: list[Batch]) -> dict[int, tuple[str, bytes, bytes]]:
    """Key, image and label of each sample index."""
    content = {}
    for batch in batches:
        assert batch.labels is not None
        for row, index in enumerate(batch.indices):
            image, label = batch.images[row], batch.labels[row]
            content[index] = (batch.keys[row], image.numpy().tobytes(), label.numpy().tobytes())
    return content


def same(one: list[Batch], other: list[Batch]) -> bool:
    order = [[batch.indices for batch in batches] for batches in (one, other)]
    return order[0] == order[1] and samples(one) == samples(other)


def test_batches_are_uint8_crops_with_their_keys_and_sample_indices(manifest: Manifest) -> None:
    first, second = take(start(manifest), 2)
    assert first.labels is not None
    assert (first.images.shape, first.labels.shape) == ((4, 3, 16, 16), (4, 16, 16))
    assert (first.images.dtype, first.labels.dtype) == (torch.uint8, torch.uint8)
    assert set(first.labels.unique().tolist()) <= {0, 1, 2, 255}
    assert (first.indices, second.indices) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert len(set(first.keys + second.keys)) == 8


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_with_any_number_of_workers(manifest: Manifest, workers: int) -> None:
    plain = take(start(manifest, accumulation=2), 11)
    assert same(take(start(manifest, {"workers": workers}, accumulation=2), 11), plain)


def test_a_restart_goes_on_where_an_uninterrupted_stream_would(manifest: Manifest) -> None:
    whole = take(start(manifest, accumulation=2), 14)
    assert same(take(start(manifest, {"workers": 2}, accumulation=2, start_step=4), 6), whole[8:])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_takes_the_same_samples_and_crops_on_any_number_of_ranks(
    manifest: Manifest, world_size: int, accumulation: int
) -> None:
    shared = [
        batch
        for rank in range(world_size)
        for batch in take(
            start(manifest, rank=rank, world_size=world_size, accumulation=accumulation), 3 * accumulation
        )
    ]
    assert samples(shared) == samples(take(start(manifest), 3))


def test_one_shard_feeds_four_ranks(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [8])
    ranks = [take(start(manifest, rank=rank, world_size=4), 2) for rank in range(4)]
    assert sorted(key for batches in ranks for batch in batches for key in batch.keys) == manifest.shards[0].keys


def test_fewer_samples_than_a_batch_come_round_again(tmp_path: Path) -> None:
    batches = take(start(make_shards(tmp_path / "shards", [1, 2])), 3)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(["000-000", "001-000", "001-001"] * 4)


def test_domains_are_cropped_and_ordered_independently(manifest: Manifest) -> None:
    source, target = (take(start(manifest, domain=domain), 3) for domain in ("source", "target"))
    assert [batch.keys for batch in source] != [batch.keys for batch in target]


def test_a_sources_own_range_resizes_the_source_alone(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", [[sample_members(1)]])
    # Twice the stored size, cropped to a quarter of the image; and the whole image at its stored size.
    keys = {"shorter_edge": (24, 24), "source_shorter_edge": (48, 48), "crop": (24, 40), "flip": 0.0}
    source, target = (
        take(start(manifest, keys, domain=domain, global_batch=1), 1)[0] for domain in ("source", "target")
    )
    both = take(start(manifest, keys | {"source_shorter_edge": None}, global_batch=1), 1)[0]
    assert source.labels is not None
    assert target.labels is not None
    assert torch.equal(target.images, both.images)
    doubled = target.labels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    windows = doubled.unfold(1, 24, 1).unfold(2, 40, 1)
    assert (windows == source.labels[:, None, None]).all(dim=(3, 4)).any()


def test_batches_say_how_many_columns_of_its_image_are_beside_a_crop(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [4])
    for workers in (0, 1):
        keys = {"workers": workers, "shorter_edge": (24, 24), "crop": (24, 16)}
        beside = [pair for batch in take(start(manifest, keys), 3) for pair in batch.beside]
        assert len(beside) == 12
        assert {left + right for left, right in beside} == {40 - 16}
        assert len(set(beside)) > 3


def test_unlabelled_shards_give_no_labels(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [4], labelled=False)
    assert take(start(manifest, {"workers": 1}, domain="target"), 1)[0].labels is None


def test_labels_are_given_in_the_chosen_classes(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", [[sample_members(1)]])
    keys = {"shorter_edge": (24, 24), "crop": (24, 40), "flip": 0.0}
    plain, chosen = (
        take(start(manifest, keys | {"classes": classes}, global_batch=1), 1)[0].labels
        for classes in (None, ("car", "road"))
    )
    assert plain is not None
    assert chosen is not None
    expected = torch.full_like(plain, 255)
    expected[plain == 2] = 0
    expected[plain == 0] = 1
    assert torch.equal(chosen, expected)


def test_streaming_leaves_the_models_random_numbers_alone(manifest: Manifest) -> None:
    before = torch.get_rng_state()
    take(start(manifest, {"workers": 1}), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({}, {"global_batch": 5, "world_size": 2}, r"training\.source_batch: 5 samples"),
        ({"crop": (16, 50)}, {}, r"data\.crop: 16 x 50"),
        ({"classes": ("boat",)}, {}, r"data\.classes: 'boat'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    manifest: Manifest, keys: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start(manifest, keys, **arguments)


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: .* has no samples"):
        start(write_shards(tmp_path / "shards", [[]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_stops_the_stream_with_one_line_naming_shard_and_key(tmp_path: Path, workers: int) -> None:
    manifest = make_shards(tmp_path / "shards", [3])
    os.truncate(tmp_path / "shards" / manifest.shards[0].name, manifest.shards[0].offsets[2] + 600)
    with pytest.raises(UserError, match=r"^[^\n]*shard-000000\.tar: ends inside sample '000-002'[^\n]*$"):
        take(start(manifest, {"workers": workers}, global_batch=1), 3)
    assert active_children() == []


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_hostile_members_execute_and_write_nothing(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "executed"))
    hostile = {"pyd": trap, "pickle": trap, "pth": trap, "cls": trap, "../../../../written": b"text"}
    manifest = write_shards(tmp_path / "shards", [[{**sample_members(0), **hostile}]])
    assert len(manifest.shards[0].keys) == 1
    before = sorted(tmp_path.rglob("*"))
    assert take(start(manifest, global_batch=1), 1)[0].keys == ["000-000"]
    assert sorted(tmp_path.rglob("*")) == before


def test_closing_ends_the_loader_processes(manifest: Manifest) -> None:
    with closing(start(manifest, {"workers": 2})) as batches:
        next(batches)
        assert len(active_children()) == 2
    assert active_children() == []


def test_closing_a_stream_leaves_the_loader_processes_of_others_running(manifest: Manifest) -> None:
    plain = take(start(manifest), 6)
    alone = start(manifest, {"workers": 0})
    next(alone)
    with closing(start(manifest, {"workers": 2})) as batches:
        some = [next(batches), next(batches)]
        alone.close()
        assert len(active_children()) == 2
        assert same(some + list(islice(batches, 4)), plain)


def test_signals_to_all_processes_leave_the_loader_running(manifest: Manifest) -> None:
    plain = take(start(manifest), 12)
    with closing(start(manifest, {"workers": 2})) as batches:
        some = [next(batches), next(batches)]
        for process in active_children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(process.pid or 0, number)
        assert same(some + list(islice(batches, 10)), plain)
    assert active_children() == []


LEAVING = """
import multiprocessing, os, signal, sys, time
from dist_pca.data.stream import stream
from dist_pca.shards.manifest import load_manifest
from tests.support.shards import data_config

def train():
    global batches
    batches = stream(data_config(workers=2), [load_manifest(sys.argv[1])], "source", seed=0, rank=0, world_size=1,
                     global_batch=4, accumulation=1, start_step=0)
    next(batches)

def interrupted():
    train()
    try:
        os.killpg(os.getpgid(0), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        pass

def in_a_child():
    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


@pytest.mark.parametrize("ending", ["train", "interrupted", "in_a_child"])
def test_leaving_without_closing_is_quick_and_silent(manifest: Manifest, ending: str) -> None:
    command = [sys.executable, "-c", f"{LEAVING}\n{ending}()", str(manifest.folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, start_new_session=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_evaluation_takes_every_sample_once_over_all_ranks(
    manifest: Manifest, evaluated: list[EvaluationSample], world_size: int, workers: int
) -> None:
    assert [sample.key for sample in evaluated] == [key for shard in manifest.shards for key in shard.keys]
    for rank in range(world_size):
        share = list(evaluation_stream(manifest, rank, world_size, classes=CLASSES, workers=workers))
        assert [sample.key for sample in share] == [sample.key for sample in evaluated[rank::world_size]]
        for sample, expected in zip(share, evaluated[rank::world_size], strict=True):
            assert np.array_equal(sample.image, expected.image)
            assert np.array_equal(sample.label, expected.label)  # type: ignore[arg-type]


def test_evaluation_samples_are_whole_images_and_labels(tmp_path: Path) -> None:
    members = sample_members(4)
    manifest = write_shards(tmp_path / "shards", [[members]])
    classes = (ClassInfo("sky", (0, 0, 0)), ClassInfo("road", (0, 0, 0)))
    (sample,) = evaluation_stream(manifest, 0, 1, classes=classes, workers=0)
    generator = np.random.default_rng(4)
    image = generator.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    label = generator.choice(np.array([0, 1, 2, 255], np.uint8), (24, 40))
    assert np.array_equal(sample.image, image)
    assert sample.label is not None
    assert sample.label.dtype == np.uint8
    assert np.array_equal(sample.label, np.select([label == 0, label == 1], [1, 0], 255))


def test_more_ranks_than_samples_leave_some_without(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [2], labelled=False)
    shares = [list(evaluation_stream(manifest, rank, 3, classes=CLASSES, workers=1)) for rank in range(3)]
    assert [[(sample.key, sample.label) for sample in share] for share in shares] == [
        [("000-000", None)],
        [("000-001", None)],
        [],
    ]


def test_eight_ranks_of_four_workers_share_one_shard_of_few_samples(tmp_path: Path) -> None:
    shard = make_shards(tmp_path / "shards", [3])
    plain = take(start(shard, global_batch=16), 3)
    ranks = [take(start(shard, {"workers": 4}, rank=rank, world_size=8, global_batch=16), 3) for rank in range(8)]
    assert samples([batch for batches in ranks for batch in batches]) == samples(plain)
    assert active_children() == []


def test_consecutive_batches_are_not_from_one_shard(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", [16] * 8)
    batches = take(start(shards, {"shuffle_window": 4}, global_batch=8), 16)
    origins = [{key.split("-")[0] for key in batch.keys} for batch in batches]
    assert all(len(shards) > 1 for shards in origins)
    assert sum(len(shards) >= 3 for shards in origins) >= 12


def test_a_sample_travels_anywhere_within_its_window(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", [16] * 4)
    found: dict[str, list[int]] = {}
    for seed in range(6):
        for batch in take(start(shards, {"shuffle_window": 4}, global_batch=64, seed=seed), 1):
            for key, index in zip(batch.keys, batch.indices, strict=True):
                found.setdefault(key, []).append(index)
    travelled = [max(indices) - min(indices) for indices in found.values()]
    assert np.mean(travelled) > 32


def test_folders_are_mixed_by_their_weights(tmp_path: Path) -> None:
    one, other = make_shards(tmp_path / "one", [4]), make_shards(tmp_path / "other", [2, 5])
    config = data_config(source=({"shards": "one", "weight": 3}, {"shards": "other", "weight": 1}))
    arguments = {"seed": 0, "rank": 0, "world_size": 1, "global_batch": 256, "accumulation": 1, "start_step": 0}
    (batch,) = take(stream(config, [one, other], "source", **arguments), 1)  # type: ignore[arg-type]
    assert sum(key in set(one.shards[0].keys) for key in batch.keys) >= 192


def test_a_rare_class_is_in_the_crop_that_it_was_drawn_for(tmp_path: Path) -> None:
    label = np.zeros((96, 160), np.uint8)
    label[40:52, 8:20] = 2
    image = np.zeros((96, 160, 3), np.uint8)
    manifest = write_shards(tmp_path / "shards", [[{"png": png(image), "label.png": png(label)}]], size=(96, 160))
    counts = [[96 * 160 - 144, 0, 144]]
    manifest = replace(manifest, shards=(replace(manifest.shards[0], pixel_counts=counts),))
    keys = {"shorter_edge": (96, 96), "crop": (24, 24)}
    rare = {"source": "rare_class", "min_pixels": 100, "min_crop_pixels": 60, "crop_attempts": 200}

    def shown(sampling: dict[str, Any]) -> float:
        labels = [batch.labels for batch in take(start(manifest, {**keys, "sampling": sampling}), 10)]
        return sum(int(((label == 2).sum(dim=(1, 2)) >= 60).sum()) for label in labels if label is not None) / 40

    assert shown({}) < 0.3
    assert shown(rare) == 1.0
    assert 0.3 < shown({**rare, "crop_attempts": 12}) < 1.0
