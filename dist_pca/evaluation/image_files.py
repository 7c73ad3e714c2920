"""Find the image files given on a command line, and name their results."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from dist_pca.errors import UserError
from dist_pca.shards.images import SUFFIXES
from dist_pca.shards.sample import as_rgb, decode_header, decode_pixels


def find_images(sources: Sequence[str], out: Path) -> list[Path]:
    """Expand files, folders and globs to image files, each once, in the given order, sorted within folders and globs.

    A folder stands for all images below it, by extension, without hidden files and without those in `out`.

    Raises:
        UserError: a source does not exist, or contains no image.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        files = list(_files(source, out.resolve()))
        if not files:
            kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
            raise UserError(f"{source}: no image there; give image files, folders or globs ({kinds})")
        for path in files:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def result_names(images: Sequence[Path]) -> dict[Path, str]:
    """Unique names, without extension, for the results of each image; case-insensitive file systems are considered.

    A name is the image's path below the common folder of all images, with the extension if it is needed to distinguish
    two of them.
    """
    absolute = {path: path.parent.resolve() / path.name for path in images}
    common = Path(os.path.commonpath([path.parent for path in absolute.values()]))
    plain = {path: place.relative_to(common).with_suffix("").as_posix() for path, place in absolute.items()}
    count = Counter(name.casefold() for name in plain.values())
    taken = {name for name, number in count.items() if number == 1}
    names = {}
    for path, name in plain.items():
        if count[name.casefold()] > 1:
            number, stem = 1, absolute[path].relative_to(common).as_posix()
            name = stem
            while name.casefold() in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name.casefold())
        names[path] = name
    return names


def read_image(path: Path) -> Image.Image:
    """Read an image in 8-bit RGB, rotated according to its EXIF data.

    Raises:
        UserError: it is not an image of a known format, too large, or damaged.
    """
    try:
        image: Image.Image = decode_header(path)
        decode_pixels(image)
        return as_rgb(ImageOps.exif_transpose(image))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}; replace it, or leave it out with --on-error skip") from error


def _files(source: str, out: Path) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        return sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
            and not file.resolve().is_relative_to(out)
        )
    if path.exists():
        return [path]
    if glob.has_magic(source):
        # Path.glob does not support absolute patterns.
        names = glob.glob(source, recursive=True)  # noqa: PTH207
        return sorted(Path(name) for name in names if Path(name).is_file())
    raise UserError(f"{source}: no such file or folder")
