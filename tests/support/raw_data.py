"""Small raw data sets in the real ones' layout and coding."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_pca.resources import resource

Ids = npt.NDArray[np.integer]


def random_image(seed: int, height: int = 12, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def with_orientation(image: Image.Image, tag: int, path: Path, **options: Any) -> Path:
    """Save an image as a camera that was turned does: with turned pixels, and an EXIF orientation that says so."""
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    same = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 7: "TRANSVERSE"}
    turn = inverse.get(tag) or (Image.Transpose[same[tag]] if tag in same else None)
    exif = Image.Exif()
    exif[0x0112] = tag
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if turn is None else image.transpose(turn)).save(path, exif=exif, **options)
    return path


def blocks(height: int = 64, width: int = 96) -> Image.Image:
    """Squares of 16 pixels of one colour, which lossy compression changes little."""
    small = np.random.default_rng(3).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(small, np.ones((16, 16, 1), np.uint8)))


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


def tiff(values: npt.NDArray[Any], kind: int = 1, *, deflated: bool = False) -> bytes:
    """A TIFF of height x width x bands of any type, which Pillow cannot write for several deep bands.

    `kind` is the sample format: 1 without a sign, 2 with one, 3 a float.
    """
    height, width, bands = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    if deflated:
        data = zlib.compress(data)
    bits = struct.pack(f"<{bands}H", *[8 * values.dtype.itemsize] * bands)
    formats = struct.pack(f"<{bands}H", *[kind] * bands)
    entries = [
        *(
            (256, 4, 1, width),
            (257, 4, 1, height),
            (259, 3, 1, 8 if deflated else 1),
            (262, 3, 1, 2 if bands == 3 else 1),
        ),
        *((277, 3, 1, bands), (278, 4, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1)),
    ]
    end = 8 + 2 + 12 * (len(entries) + 3) + 4
    places = {258: (bits, end), 339: (formats, end + len(bits))}
    entries.append((273, 4, 1, end + len(bits) + len(formats)))
    for tag, (content, place) in places.items():
        value = place if len(content) > 4 else int.from_bytes(content.ljust(4, b"\0"), "little")
        entries.append((tag, 3, bands, value))
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return header + directory + struct.pack("<I", 0) + bits + formats + data


def make_band_folder(root: Path, bands: int, samples: int = 4, *, dtype: Any = np.uint8) -> list[npt.NDArray[Any]]:
    """`make_folder` with TIFFs of other than three bands, and its recipe as `recipe.yaml`; returns their values."""
    make_folder(root, samples)
    top = 255 if dtype is np.uint8 else 4095
    values: list[npt.NDArray[Any]] = [
        np.random.default_rng(number).integers(0, top + 1, (12, 20, bands)).astype(dtype) for number in range(samples)
    ]
    for number, array in enumerate(values):
        (root / f"images/{number:03d}.png").unlink()
        (root / f"images/{number:03d}.tif").write_bytes(tiff(array))
    deep = "" if dtype is np.uint8 else f"range: [0, {top}]\n"
    recipe = resource("shards", "folder").read_text(encoding="utf-8")
    (root / "recipe.yaml").write_text(f"{recipe}\nbands: {bands}\n{deep}")
    return values


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
    root.mkdir(parents=True, exist_ok=True)
    entries = [f"- {{name: class {index}, color: [{index * 40}, 100, 200]}}\n" for index in range(classes)]
    (root / "classes.yaml").write_text("".join(entries))
