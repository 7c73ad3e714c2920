"""Small raw data sets in the real ones' layout and coding."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Ids = npt.NDArray[np.integer]


def random_image(seed: int, height: int = 12, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def palette_image(ids: Ids) -> Image.Image:
    """A palette image whose colours have nothing to do with its indices."""
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    assert image.mode == "P"
    return image


def png16(values: Ids) -> bytes:
    """A 16-bit PNG of height x width x channels (1, 3 or 4), which Pillow cannot write for several channels."""
    height, width, channels = values.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(tag: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def make_gta5(root: Path, ids: list[Ids]) -> None:
    for number, label in enumerate(ids, start=1):
        save(random_image(number, *label.shape), root / f"images/{number:05d}.png")
        save(palette_image(label), root / f"labels/{number:05d}.png")


def make_synthia(root: Path, ids: list[Ids]) -> None:
    for number, label in enumerate(ids):
        save(random_image(number, *label.shape), root / f"RGB/{number:07d}.png")
        instances = np.random.default_rng(number).integers(0, 65536, label.shape)
        path = root / f"GT/LABELS/{number:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png16(np.stack([label, instances, np.zeros_like(label)], axis=-1)))


def make_cityscapes(root: Path, split: str, city: str, ids: list[Ids]) -> None:
    for number, label in enumerate(ids):
        frame = f"{split}/{city}/{city}_{number:06d}_000019"
        save(random_image(number, *label.shape), root / f"leftImg8bit/{frame}_leftImg8bit.png")
        save(Image.fromarray(label.astype(np.uint8)), root / f"gtFine/{frame}_gtFine_labelIds.png")
        save(Image.fromarray(label.astype(np.uint8)), root / f"gtFine/{frame}_gtFine_instanceIds.png")


def make_camvid(sequence: Path, ids: list[Ids]) -> None:
    for number, label in enumerate(ids):
        save(random_image(number, *label.shape), sequence / f"images/{sequence.name}_f{number:05d}.png")
        save(Image.fromarray(label.astype(np.uint8)), sequence / f"labels/{sequence.name}_f{number:05d}.png")


def make_folder(root: Path, samples: int = 4, classes: int = 3, extension: str = "png") -> None:
    """Images, labels that hold every class and ignore, and the class table of the `folder` recipe."""
    label = np.resize([*range(classes), 255], (12, 20)).astype(np.uint8)
    for number in range(samples):
        save(random_image(number), root / f"images/{number:03d}.{extension}")
        save(Image.fromarray(np.roll(label, number)), root / f"labels/{number:03d}.png")
    entries = [f"- {{name: class {index}, color: [{index * 40}, 100, 200]}}\n" for index in range(classes)]
    (root / "classes.yaml").write_text("".join(entries))
