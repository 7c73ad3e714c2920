"""Images inside the page of a report, as data URLs."""

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_pca.evaluation.run_report.page import Picture


def photo(pixels: npt.NDArray[np.uint8], *, alt: str, caption: str, width: int) -> Picture:
    """Embed an RGB image (height x width x 3) as JPEG, reduced to a width if it is wider."""
    image = _reduced(pixels, width, Image.Resampling.LANCZOS)
    return _embedded(image, "JPEG", alt, caption, quality=82)


def drawing(pixels: npt.NDArray[np.uint8], *, alt: str, caption: str, width: int) -> Picture:
    """Embed an RGB image of few colours as PNG, reduced to a width by leaving out pixels if it is wider."""
    image = _reduced(pixels, width, Image.Resampling.NEAREST)
    # A palette makes the file a third as large, and label maps have fewer colours than one holds.
    return _embedded(image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256), "PNG", alt, caption, optimize=True)


def _reduced(pixels: npt.NDArray[np.uint8], width: int, filter: Image.Resampling) -> Image.Image:
    image = Image.fromarray(pixels)
    if image.width <= width:
        return image
    return image.resize((width, max(1, round(image.height * width / image.width))), filter)


def _embedded(image: Image.Image, kind: str, alt: str, caption: str, **options: object) -> Picture:
    file = io.BytesIO()
    image.save(file, kind, **options)
    encoded = base64.b64encode(file.getvalue()).decode()
    return Picture(f"data:image/{kind.lower()};base64,{encoded}", alt, caption, image.size)
