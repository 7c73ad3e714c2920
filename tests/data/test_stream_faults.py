import logging
import os
import signal
import tarfile
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from dist_pca.data.collate import Batch
from dist_pca.data.stream import stream
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest
from tests.support.shards import data_config, make_shards, sample_members, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def start(manifest: Manifest, *, step: int = 0, batch: int = 4, **keys: Any) -> Generator[Batch, None, None]:
    config = data_config(**keys)
    return stream(
        config, [manifest], "source", seed=1, rank=0, world_size=1, global_batch=batch, accumulation=1, start_step=step
    )


def take(batches: Generator[Batch, None, None], count: int) -> list[Batch]:
    with closing(batches):
        return list(islice(batches, count))


def damage(manifest: Manifest, sample: int, where: str = "image") -> None:
    """Overwrite bytes of a sample in the first shard: in its image or in its first tar header."""
    shard = manifest.shards[0]
    path = manifest.folder / shard.name
    with tarfile.open(path) as archive:
        image = archive.getmember(f"{shard.keys[sample]}.png").offset_data
    with path.open("r+b") as file:
        file.seek(image + 40 if where == "image" else shard.offsets[sample] + 100)
        file.write(b"\xff" * 30)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["image", "tar header"])
def test_a_corrupt_sample_is_named_and_another_takes_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, where: str
) -> None:
    manifest = make_shards(tmp_path / "shards", [12])
    whole = take(start(manifest, workers=workers), 3)
    damage(manifest, 5, where)
    with caplog.at_level(logging.WARNING, "dist_pca.data"):
        batches = take(start(manifest, workers=workers, max_corrupt_share=0.5), 3)
    differing = [
        (one, other)
        for before, after in zip(whole, batches, strict=True)
        for one, other in zip(before.keys, after.keys, strict=True)
        if one != other
    ]
    assert [one for one, _ in differing] == ["000-005"]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("data.source: skipped a sample: ")
    assert "shard-000000.tar" in message
    assert "'000-005'" in message
    assert active_children() == []


def test_the_replacement_is_the_same_after_a_resume_and_with_other_workers(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [12])
    for sample in (2, 5, 7):
        damage(manifest, sample)
    whole = take(start(manifest, max_corrupt_share=1), 6)
    resumed = take(start(manifest, step=2, workers=3, max_corrupt_share=1), 4)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in whole[2:]]
    assert not {"000-002", "000-005", "000-007"} & {key for batch in whole for key in batch.keys}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_samples_stop_the_stream_with_one_line(tmp_path: Path, workers: int) -> None:
    manifest = make_shards(tmp_path / "shards", [40])
    for sample in range(0, 40, 3):
        damage(manifest, sample)
    with pytest.raises(UserError, match=r"^data\.source: 5 corrupt samples among [^\n]* more than [^\n]* 0\.1 allows"):
        take(start(manifest, workers=workers, max_corrupt_share=0.1), 10)
    assert active_children() == []


def test_a_few_corrupt_samples_of_a_long_epoch_do_not_stop_it(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [40])
    damage(manifest, 3)
    assert len(take(start(manifest, max_corrupt_share=0.025), 10)) == 10
    with pytest.raises(UserError, match="1 corrupt samples among"):
        take(start(manifest, max_corrupt_share=0.0), 10)


def test_a_folder_of_nothing_but_corrupt_samples_ends(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [2])
    for sample in (0, 1):
        damage(manifest, sample)
    with pytest.raises(UserError, match=r"replacements are corrupt too$"):
        take(start(manifest, max_corrupt_share=1), 1)


def test_an_image_of_another_size_than_the_manifest_says_is_corrupt(tmp_path: Path) -> None:
    members = [sample_members(0), sample_members(1, height=30)]
    manifest = write_shards(tmp_path / "shards", [members])
    (batch,) = take(start(manifest, max_corrupt_share=1, batch=2), 1)
    assert batch.keys == ["000-000"] * 2
    assert "30 x 40 pixels where the manifest lists 24 x 40" in batch.skipped[0]


def test_a_missing_shard_stops_the_stream_and_is_not_replaced(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [2, 2])
    (manifest.folder / manifest.shards[1].name).unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        take(start(manifest, max_corrupt_share=1, batch=4), 1)


def test_labels_may_have_another_name(tmp_path: Path) -> None:
    members = sample_members(0)
    manifest = write_shards(
        tmp_path / "shards", [[{"jpg.seg.png" if k == "label.png" else k: v for k, v in members.items()}]]
    )
    renamed = replace(manifest, label_member="jpg.seg.png")
    (batch,) = take(start(renamed, batch=1), 1)
    plain = take(start(write_shards(tmp_path / "plain", [[members]]), batch=1), 1)[0]
    assert batch.labels is not None
    assert plain.labels is not None
    assert batch.labels.equal(plain.labels)


def test_a_killed_loader_process_ends_the_stream_and_the_others_with_one_line(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [4])
    batches = start(manifest, workers=2)
    # One batch of each process, so that both are up.
    next(batches), next(batches)
    os.kill(active_children()[0].pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^a loader process was killed[^\n]*$"):
        take(batches, 1000)
    assert active_children() == []
