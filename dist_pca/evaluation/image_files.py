"""Which image files a command line means, and what their results are called."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from dist_pca.errors import UserError
from dist_pca.shards.images import SUFFIXES, as_rgb, decode_header, decode_pixels


def find_images(sources: Sequence[str], out: Path) -> list[Path]:
    """Image files that files, folders and globs mean, each once, in the order given, sorted within folders and globs.

    A folder means all images below it, known by their extension, without hidden ones and without what is in `out`.

    Raises:
        UserError: a source does not exist, or means no image.
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
    """A name without extension for the results of each image, no two the same on any file system.

    It is the image's path below the folder that all of them share, with the extension where that tells two apart.
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
    """An image in 8-bit RGB, the way up that viewers show it.

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
        # Path.glob takes no absolute patterns.
        names = glob.glob(source, recursive=True)  # noqa: PTH207
        return sorted(Path(name) for name in names if Path(name).is_file())
    raise UserError(f"{source}: no such file or folder")
