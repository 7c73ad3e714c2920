"""Shards as other people write them: webdataset's own writer, and tars with strange members."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from tests.support.raw_data import Ids, random_image

Sample = Mapping[str, bytes | str]


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def label(ids: Ids) -> bytes:
    return encoded(Image.fromarray(ids.astype(np.uint8)))


def sample(
    key: str, label_member: str | None = "label.png", height: int = 12, width: int = 20
) -> dict[str, bytes | str]:
    """An image, and labels that hold the train ids 0, 1, 2 and ignore."""
    members: dict[str, bytes | str] = {"__key__": key, "jpg": encoded(random_image(len(key), height, width), "JPEG")}
    if label_member is not None:
        members[label_member] = label(np.resize([0, 1, 2, 255], (height, width)))
    return members


def write(folder: Path, samples: Sequence[Sample], per_shard: int = 2) -> Path:
    folder.mkdir(parents=True)
    pattern = str(folder / "theirs-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0, encoder=False) as writer:
        for members in samples:
            writer.write(dict(members))
    return folder


def write_tar(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]], kind: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind) as archive:  # type: ignore[call-overload]
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
