import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from dist_pca.errors import UserError
from dist_pca.shards.images import (
    FILE_FORMATS,
    SUFFIXES,
    Encoding,
    ImageFormat,
    Reading,
    ValueRange,
    encode_image,
    open_header,
    open_image,
    tile_boxes,
)
from dist_pca.shards.sample import as_rgb
from tests.support.raw_data import blocks, png16, png_header, random_image, save, tiff, with_orientation

NOISE = np.random.default_rng(0).integers(0, 1 << 16, (6, 8, 3), dtype=np.uint16)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_known_formats_are_kept_byte_for_byte_by_content_not_by_name(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    random_image(0).save(path)
    path = path.rename(tmp_path / "a.ppm")
    assert encode_image(path, open_image(path), Encoding()) == (extension, path.read_bytes())


def test_other_formats_become_png_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    random_image(0).save(path)
    extension, content = encode_image(path, open_image(path), Encoding())
    assert extension == "png"
    assert (np.asarray(Image.open(io.BytesIO(content))) == np.asarray(random_image(0))).all()


def test_an_image_in_the_wanted_format_is_not_encoded_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    random_image(0).save(path, quality=50)
    assert encode_image(path, open_image(path), Encoding("jpg", quality=95)) == ("jpg", path.read_bytes())


@pytest.mark.parametrize("target", ["jpg", "png", "webp"])
def test_images_are_converted_to_the_wanted_format(tmp_path: Path, target: str) -> None:
    path = tmp_path / "a.bmp"
    random_image(0).save(path)
    extension, content = encode_image(path, open_image(path), Encoding(target))  # type: ignore[arg-type]
    assert extension == target
    assert Image.open(io.BytesIO(content)).format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[target]


@pytest.mark.parametrize(("max_edge", "size"), [(None, (20, 12)), (20, (20, 12)), (10, (10, 6)), (1, (1, 1))])
def test_the_longer_edge_is_bounded_and_the_shape_kept(
    tmp_path: Path, max_edge: int | None, size: tuple[int, int]
) -> None:
    path = tmp_path / "a.png"
    random_image(0, height=12, width=20).save(path)
    _, content = encode_image(path, open_image(path), Encoding(max_edge=max_edge))
    assert Image.open(io.BytesIO(content)).size == size


def test_a_huge_image_is_refused_before_decoding(tmp_path: Path) -> None:
    for width, height in ((13_378, 13_378), (60_000, 60_000)):
        (tmp_path / "bomb.png").write_bytes(png_header(width, height))
        with pytest.raises(UserError, match=r"bomb\.png: more than 178,956,970 pixels"):
            open_header(tmp_path / "bomb.png")


def test_a_large_image_below_the_bound_passes_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "large.png").write_bytes(png_header(13_000, 13_000))
    with open_header(tmp_path / "large.png") as image:
        assert image.size == (13_000, 13_000)
    assert len(recwarn) == 0


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_a_truncated_image_is_refused(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    save(random_image(0, 64, 64), path)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UserError, match=rf"a\.{extension}: (damaged|unreadable) image"):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: unreadable image"):
        open_image(tmp_path / "a.png")


def test_transparent_palettes_convert_silently() -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = b"\x00\x80"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_rgb(palette).getpixel((0, 0)) == (10, 20, 30)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


FORMATS: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 95},
    "png": {},
    "tif": {},
    "webp": {"lossless": True},
    "avif": {"quality": 95},
}


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("extension", FORMATS)
def test_an_image_is_upright_whatever_its_format_and_orientation(tmp_path: Path, extension: str, tag: int) -> None:
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path = with_orientation(blocks(), tag, tmp_path / f"a.{extension}", **FORMATS[extension])
    opened = open_image(path)
    assert opened.size == (96, 64)
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(blocks())).mean() < 6
    # An encoded one does not turn again when it is read.
    targets: tuple[ImageFormat, ...] = ("png", "webp")
    for target in targets:
        _, content = encode_image(path, opened, Encoding(target, max_edge=48))
        (tmp_path / "again").write_bytes(content)
        assert open_image(tmp_path / "again").size == (48, 32)


def test_an_orientation_in_xmp_or_after_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = io.BytesIO()
    blocks().save(plain, "PNG")
    body, end = plain.getvalue()[:-12], plain.getvalue()[-12:]
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    assert open_image(_written(tmp_path / "late.png", body + chunk + end)).size == (64, 96)
    blocks().save(tmp_path / "a.jpg", xmp=b'<x:xmpmeta><rdf:li tiff:Orientation="6"/></x:xmpmeta>')
    assert open_image(tmp_path / "a.jpg").size == (64, 96)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_data_leave_the_image_as_it_is_stored(tmp_path: Path, exif: bytes) -> None:
    blocks().save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (96, 64)


def test_all_formats_of_one_picture_are_read_by_their_endings(tmp_path: Path) -> None:
    wanted = {".jfif", ".jpe", ".mpo", ".pgm", ".pbm", ".gif", ".jp2", ".tga", ".tif", ".bmp", ".webp"}
    assert wanted | ({".avif"} if features.check("avif") else set()) <= SUFFIXES
    assert not SUFFIXES & {".pdf", ".eps", ".ps", ".wmf", ".mpg", ".h5", ".txt"}
    for suffix in sorted(SUFFIXES - {".psd", ".ras", ".xbm", ".pbm", ".pfm", ".avifs"}):
        path = tmp_path / f"a{suffix}"
        random_image(0, 16, 16).convert("L" if suffix == ".pgm" else "RGB").save(path)
        assert open_image(path).size == (16, 16), suffix
        assert open_header(path).format in (*FILE_FORMATS, "MPO")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr"])
def test_images_of_any_mode_are_read_in_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new(mode, (6, 4)).save(path)
    read = open_image(path)
    assert isinstance(read, Image.Image)
    assert (read.mode, read.size) == ("RGB", (6, 4))


def _shown(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    shades: npt.NDArray[np.uint8] = np.rint((values.astype(float) - low) / (high - low) * 255).astype(np.uint8)
    return np.broadcast_to(shades, (*shades.shape[:2], 3))


DEEP: dict[str, tuple[str, bytes, npt.NDArray[Any], tuple[float, float]]] = {
    name: (suffix, content, values, bounds)
    for name, suffix, content, values, bounds in [
        ("12 bits in a grey PNG", "png", png16(NOISE[..., :1] >> 4), NOISE[..., :1] >> 4, (0, 4095)),
        ("12 bits in an RGB PNG", "png", png16(NOISE >> 4), NOISE >> 4, (0, 4095)),
        ("12 bits in a grey TIFF", "tif", tiff(NOISE[..., :1] >> 4), NOISE[..., :1] >> 4, (0, 4095)),
        ("14 bits in an RGB TIFF", "tif", tiff(NOISE >> 2), NOISE >> 2, (0, 16383)),
        ("14 bits in a compressed RGB TIFF", "tif", tiff(NOISE >> 2, deflated=True), NOISE >> 2, (0, 16383)),
        ("floats", "tif", tiff((NOISE[..., :1] / 65535).astype("f4"), 3), NOISE[..., :1] / 65535, (0, 1)),
        ("int16", "tif", tiff((NOISE[..., :1] // 2 - 99).astype("i2"), 2), NOISE[..., :1] // 2 - 99.0, (-99, 32700)),
        ("int32", "tif", tiff(NOISE[..., :1].astype("i4") * 9, 2), NOISE[..., :1] * 9.0, (0, 600_000)),
        (
            "dark PGM",
            "pgm",
            b"P5 8 6 65535\n" + (NOISE[..., 0] >> 4).astype(">u2").tobytes(),
            NOISE[..., :1] >> 4,
            (0, 4095),
        ),
    ]
}


@pytest.mark.parametrize("case", DEEP)
def test_deep_images_need_a_range_and_are_shown_in_it(tmp_path: Path, case: str) -> None:
    suffix, content, values, (low, high) = DEEP[case]
    path = _written(tmp_path / f"a.{suffix}", content)
    with pytest.raises(UserError, match=rf"a\.{suffix}: has .*values .* to .*`range: \[low, high\]`") as refused:
        open_image(path)
    assert "\n" not in str(refused.value)
    opened = open_image(path, Reading((ValueRange(low, high),)))
    assert np.abs(np.asarray(opened).astype(int) - _shown(values, low, high)).max() <= 1
    assert encode_image(path, opened, Encoding())[0] == "png"
    with pytest.raises(UserError, match=r"values .* outside the recipe's range .*`clip: true`"):
        open_image(path, Reading((ValueRange(low, low + (high - low) / 3),)))
    clipped = np.asarray(open_image(path, Reading((ValueRange(low, low + (high - low) / 3, clip=True),))))
    assert (clipped == 255).any()


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("png", png16(NOISE[..., :1])),
        ("png", png16(NOISE)),
        ("tif", tiff(NOISE)),
        ("pgm", b"P5 8 6 65535\n" + NOISE[..., 0].astype(">u2").tobytes()),
        ("pgm", b"P5 8 6 4095\n" + (NOISE[..., 0] >> 4).astype(">u2").tobytes()),
    ],
)
def test_16_bits_of_the_full_range_keep_their_shades(tmp_path: Path, suffix: str, content: bytes) -> None:
    opened = np.asarray(open_image(_written(tmp_path / f"a.{suffix}", content)))
    expected = NOISE if (opened[..., 0] != opened[..., 1]).any() else NOISE[..., :1]
    assert np.abs(opened.astype(int) - (expected >> 8)).max() <= 1


def test_a_range_leaves_8_bit_images_and_alpha_alone(tmp_path: Path) -> None:
    random_image(1).save(tmp_path / "a.png")
    assert np.array_equal(
        np.asarray(open_image(tmp_path / "a.png", Reading((ValueRange(0, 9),)))), np.asarray(random_image(1))
    )
    opaque = np.concatenate([NOISE >> 4, np.full_like(NOISE[..., :1], 65535)], axis=-1)
    opened = open_image(_written(tmp_path / "alpha.png", png16(opaque)), Reading((ValueRange(0, 4095),)))
    assert np.abs(np.asarray(opened).astype(int) - _shown(NOISE >> 4, 0, 4095)).max() <= 1


def test_values_that_are_not_numbers_and_bands_that_are_not_rgb_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tif: has values that are not numbers"):
        open_image(
            _written(tmp_path / "a.tif", tiff(np.full((2, 2, 1), np.nan, "f4"), 3)), Reading((ValueRange(0, 1),))
        )
    with pytest.raises(UserError, match=r"b\.tif: is a TIFF of 5 bands of 16 bits"):
        open_image(_written(tmp_path / "b.tif", tiff(np.zeros((2, 2, 5), np.uint16))))


@given(
    values=st.lists(st.integers(0, 65535), min_size=4, max_size=4),
    low=st.integers(0, 65534),
    span=st.integers(1, 65535),
    suffix=st.sampled_from(["png", "tif"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_range_is_linear_and_never_cuts_without_being_asked(
    tmp_path: Path, values: list[int], low: int, span: int, suffix: str
) -> None:
    array = np.array(values, np.uint16).reshape(2, 2, 1)
    path = _written(tmp_path / f"a.{suffix}", png16(array) if suffix == "png" else tiff(array))
    share = (np.array(values) - low) / span
    clipped = np.asarray(open_image(path, Reading((ValueRange(low, low + span, clip=True),))))[..., 0].ravel()
    assert np.abs(clipped - np.clip(share, 0, 1) * 255).max() <= 0.5 + 1e-6
    if share.min() >= 0 and share.max() <= 1:
        assert np.array_equal(
            np.asarray(open_image(path, Reading((ValueRange(low, low + span),))))[..., 0].ravel(), clipped
        )
    else:
        with pytest.raises(UserError, match="outside the recipe's range"):
            open_image(path, Reading((ValueRange(low, low + span),)))


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tile=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    overlap=st.integers(0, 29),
)
def test_every_pixel_is_in_a_tile_of_the_wanted_size(
    size: tuple[int, int], tile: tuple[int, int], overlap: int
) -> None:
    encoding = Encoding(tile=tile, overlap=min(overlap, min(tile) - 1))
    boxes = tile_boxes(size, encoding)
    seen = np.zeros(size[::-1], bool)
    for left, top, right, bottom in boxes:
        assert (bottom - top, right - left) == (min(tile[0], size[1]), min(tile[1], size[0]))
        seen[top:bottom, left:right] = True
    assert seen.all()
    assert len(set(boxes)) == len(boxes)
