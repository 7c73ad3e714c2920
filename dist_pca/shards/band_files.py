"""Raw files that hold any number of bands of any type: TIFF, read by tifffile, and arrays of NumPy."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_pca.errors import UserError

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF and of a BigTIFF."""
_NPY_START = b"\x93NUMPY"
_GREY_OR_COLOUR = ("MINISBLACK", "RGB", "YCBCR", "SEPARATED")
"""Interpretations of a TIFF under which its values are the shades themselves."""


class BandFile(NamedTuple):
    """A file whose pixels have not been read."""

    kind: str
    """Format, for messages."""
    size: tuple[int, int]
    """Height and width as stored, before the orientation turns it."""
    bands: int
    dtype: np.dtype[Any]
    orientation: int
    """EXIF orientation, 1 to 8."""
    read: Callable[[], npt.NDArray[Any]]
    """Reads the values, height x width x bands."""


def open_band_file(path: Path) -> BandFile | None:
    """Read the layout of a TIFF or of an array of NumPy; None if the file is neither.

    Raises:
        UserError: it is a TIFF, and tifffile is not installed.
        ValueError: it cannot be read, or is not one image.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(6)
    if start == _NPY_START:
        return _open_npy(path)
    return _open_tiff(path) if start.startswith(_TIFF_STARTS) else None


def _open_npy(path: Path) -> BandFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, which fails in many ways
        raise ValueError(f"unreadable array ({error})") from error
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape}, not of height x width x bands")
    values = array if array.ndim == 3 else array[..., np.newaxis]
    height, width, bands = values.shape
    return BandFile("NPY", (height, width), bands, values.dtype, 1, lambda: values)


def _open_tiff(path: Path) -> BandFile:
    try:
        tifffile: Any = import_module("tifffile")
    except ImportError:
        raise UserError(
            f"{path}: bands of a TIFF are read by tifffile, which is not installed; pip install 'dist-pca[bands]'"
        ) from None
    try:
        with tifffile.TiffFile(path) as file:
            first = file.series[0]
            axes, shape, dtype = first.axes, first.shape, first.dtype
            meaning = getattr(first.keyframe.photometric, "name", str(first.keyframe.photometric))
            tag = first.keyframe.tags.get("Orientation")
    except Exception as error:  # damaged files make tifffile raise exceptions of any type
        raise ValueError(f"unreadable TIFF ({error})") from error
    if meaning not in _GREY_OR_COLOUR:
        raise ValueError(f"a TIFF whose values are {meaning}, not grey, RGB or other bands")
    others = [name for name in axes if name not in "YX"]
    if dtype is None or sorted(axes.replace("".join(others), "")) != ["X", "Y"] or len(others) > 1:
        raise ValueError(f"a TIFF of shape {shape} and axes {axes}, not of one image of several bands")
    sizes = dict(zip(axes, shape, strict=True))

    def read() -> npt.NDArray[Any]:
        try:
            values = tifffile.imread(path, series=0)
        except Exception as error:
            raise ValueError(f"damaged TIFF ({' '.join(str(error).split())})") from error
        places = [axes.index(name) for name in ("Y", "X", *others)]
        bands: npt.NDArray[Any] = values.transpose(places).reshape(sizes["Y"], sizes["X"], -1)
        return bands

    count = sizes[others[0]] if others else 1
    return BandFile("TIFF", (sizes["Y"], sizes["X"]), count, dtype, int(tag.value) if tag else 1, read)
