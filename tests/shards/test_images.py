import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.images import Encoding, encode_image, open_header, open_image
from dist_pca.shards.sample import as_rgb
from tests.support.raw_data import png_header, random_image, save


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


def test_16_bit_grey_keeps_its_shades_and_transparent_palettes_convert_silently() -> None:
    ramp = np.arange(0, 1 << 16, 256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(np.asarray(as_rgb(Image.fromarray(ramp)))[..., 0].ravel(), np.arange(256))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = b"\x00\x80"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
