import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_pca.data.decode import decode_sample
from dist_pca.errors import UserError
from tests.support.raw_data import png16
from tests.support.shards import png, sample_members


def sample(**members: bytes) -> dict[str, Any]:
    named = {name.replace("label_png", "label.png"): content for name, content in members.items()}
    return {"__key__": "street", "__url__": "shards/shard-000003.tar", "__size__": (24, 40), "__bands__": 3, **named}


def encoded(mode: str, file_format: str, size: tuple[int, int] = (40, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, file_format)
    return buffer.getvalue()


def turned(tag: int, size: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    content = bytearray(encoded("RGB", "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    ("extension", "file_format", "mode"),
    [
        ("jpg", "JPEG", "RGB"),
        ("jpeg", "JPEG", "L"),
        ("jpg", "JPEG", "CMYK"),
        ("png", "PNG", "RGBA"),
        ("png", "PNG", "P"),
        ("webp", "WEBP", "RGB"),
    ],
)
def test_every_image_becomes_rgb(extension: str, file_format: str, mode: str) -> None:
    image, label = decode_sample(sample(**{extension: encoded(mode, file_format)}), label_member=None)
    assert (image.getbands(), image.size, label) == (("R", "G", "B"), (40, 24), None)


def test_labels_keep_their_ids_in_grey_and_palette_images() -> None:
    ids = np.arange(24 * 40, dtype=np.uint32).reshape(24, 40).astype(np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette(bytes(range(255, -1, -1)) * 3)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    for content in (png(ids), buffer.getvalue()):
        _, label = decode_sample(sample(png=encoded("RGB", "PNG"), label_png=content), label_member="label.png")
        assert np.array_equal(np.asarray(label), ids)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_other_members_are_never_looked_into(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "executed"))
    others = dict.fromkeys(("pyd", "pickle", "pth", "pkl", "cls", "json", "npy"), trap)
    image, _ = decode_sample(sample(**others, png=sample_members(0)["png"]), label_member=None)
    assert image.size == (40, 24)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(20_000, 10_000), (200_000, 200_000)])
def test_huge_images_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"shard-000003\.tar: sample 'street': png: more than 178,956,970 pixels"):
        decode_sample(sample(png=claims(*size)), label_member=None)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"txt": b"hello"}, r"no image \(jpg, jpeg, png, webp\)"),
        ({"jpg": b"not an image"}, "jpg: unreadable"),
        ({"png": encoded("RGB", "BMP")}, "png: unreadable"),
        ({"png": sample_members(0)["png"][:-500]}, "png: damaged"),
        ({"png": encoded("RGB", "PNG", (30, 24))}, "png: 24 x 30 pixels where the manifest lists 24 x 40"),
        ({"png": encoded("RGB", "PNG")}, r"no label\.png"),
        ({"png": png16(np.full((24, 40, 1), 4095))}, "png: 16-bit values 4095 to 4095; state their `range`"),
        ({"png": png16(np.full((24, 40, 3), 4095))}, "png: 16-bit values of about 3840 to 4096; state their `range`"),
        ({"jpg": turned(5, (40, 24))}, "jpg: 40 x 24 pixels where the manifest lists 24 x 40"),
        ({"png": encoded("RGB", "PNG"), "label_png": encoded("RGB", "PNG")}, r"label\.png: mode RGB"),
        ({"png": encoded("RGB", "PNG"), "label_png": encoded("I;16", "PNG")}, r"label\.png: mode I;16"),
        ({"png": encoded("RGB", "PNG"), "label_png": encoded("L", "JPEG")}, r"label\.png: unreadable"),
        ({"png": encoded("RGB", "PNG"), "label_png": encoded("L", "PNG", (40, 23))}, r"label\.png: 23 x 40"),
    ],
)
def test_a_bad_sample_names_its_shard_its_key_and_the_fault(members: dict[str, bytes], fault: str) -> None:
    with pytest.raises(UserError, match=rf"^shards/shard-000003\.tar: sample 'street': {fault}[^\n]*$"):
        decode_sample(sample(**members), label_member="label.png")
