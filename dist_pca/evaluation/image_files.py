"""Find the image files given on a command line, and name their results."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dist_pca.errors import UserError
from dist_pca.shards.find import Found, described
from dist_pca.shards.find import find_images as find_below
from dist_pca.shards.images import SUFFIXES


def find_images(sources: Sequence[str], out: Path, suffixes: frozenset[str] = SUFFIXES) -> Found:
    """Expand files, folders and globs to image files, each once, in the given order, sorted within folders and globs.

    A folder stands for all images below it. A file is taken whatever its name; below folders and in globs images are
    found by their extension, one of `suffixes`, without hidden files and without those in `out`.

    Raises:
        UserError: a source does not exist, or contains no image.
    """
    found: dict[Path, Path] = {}
    passed_over: dict[str, tuple[Path, ...]] = {}
    for source in sources:
        below = _found(source, suffixes)
        images = [path for path in below.images if not path.resolve().is_relative_to(out.resolve())]
        if not images:
            reason = f" (passed over: {described(below.passed_over)})" if below.passed_over else ""
            kinds = ", ".join(sorted(suffix[1:] for suffix in suffixes))
            raise UserError(f"{source}: no image there{reason}; give image files, folders or globs ({kinds})")
        for path in images:
            found.setdefault(path.resolve(), path)
        for why, paths in below.passed_over.items():
            passed_over[why] = (*passed_over.get(why, ()), *paths)
    return Found(tuple(found.values()), passed_over)


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


def _found(source: str, suffixes: frozenset[str]) -> Found:
    path = Path(source)
    if path.is_dir():
        return find_below(path, ["**/*"], suffixes)
    if path.exists():
        return Found((path,), {})
    parts = PurePosixPath(source).parts
    first = next((index for index, part in enumerate(parts) if glob.has_magic(part)), None)
    if first is None:
        raise UserError(f"{source}: {'a link to nothing' if path.is_symlink() else 'no such file or folder'}")
    return find_below(Path(*parts[:first]), ["/".join(parts[first:])], suffixes)
