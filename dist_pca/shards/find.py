"""Find image files by glob, with symlinked folders followed, and keep account of the files that are passed over."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from dist_pca.shards.images import SUFFIXES


@dataclass(frozen=True)
class Found:
    """Images that match globs, and the other files that do, by the reason why they are none."""

    images: tuple[Path, ...]
    """Sorted by path."""
    passed_over: dict[str, tuple[Path, ...]]


def find_images(folder: Path, patterns: Sequence[str], suffixes: frozenset[str] = SUFFIXES) -> Found:
    """Find the images below a folder whose path matches one of the globs.

    `**` spans folders and follows links to folders, but not back to one that it is in. Names that begin with a dot
    match no wildcard. A file is an image if it has one of the extensions `suffixes`.
    """
    unreadable: dict[Path, None] = {}
    matches = (path for pattern in patterns for path in _matches(folder, PurePosixPath(pattern).parts, unreadable))
    images: list[Path] = []
    others: dict[str, list[Path]] = {}
    for path in sorted(set(matches)):
        reason = _reason(path, suffixes)
        if reason is None:
            images.append(path)
        else:
            others.setdefault(reason, []).append(path)
    if unreadable:
        others["unreadable folder"] = list(unreadable)
    return Found(tuple(images), {reason: tuple(paths) for reason, paths in others.items()})


def described(passed_over: dict[str, tuple[Path, ...]], root: Path | None = None) -> str:
    """List what was passed over, by count and reason, with the first path of each (relative to `root`)."""
    return ", ".join(
        f"{len(paths):,} {reason} ({paths[0] if root is None else paths[0].relative_to(root)}"
        f"{', ...' if len(paths) > 1 else ''})"
        for reason, paths in sorted(passed_over.items(), key=lambda item: -len(item[1]))
    )


def _reason(path: Path, suffixes: frozenset[str]) -> str | None:
    """Why a path is no image; None if it is one."""
    if not path.exists():
        return "link to nothing" if path.is_symlink() else "file that is gone"
    if not path.is_file():
        return "special file"
    if path.suffix.lower() in suffixes:
        return None
    return f"{path.suffix} file" if path.suffix else "file without extension"


def _matches(folder: Path, parts: Sequence[str], unreadable: dict[Path, None]) -> Iterator[Path]:
    """Paths below a folder, other than folders, that match a glob given in parts."""
    first, rest = parts[0], parts[1:]
    if first == "**":
        for inner in _folders(folder, unreadable):
            yield from _matches(inner, rest or ("*",), unreadable)
    elif glob.has_magic(first):
        for entry in _entries(folder, unreadable):
            if fnmatchcase(entry.name, first) and _is_folder(entry) == bool(rest):
                yield from _matches(folder / entry.name, rest, unreadable) if rest else [folder / entry.name]
    elif rest:
        if (folder / first).is_dir():
            yield from _matches(folder / first, rest, unreadable)
    elif os.path.lexists(folder / first) and not (folder / first).is_dir():
        yield folder / first


def _folders(folder: Path, unreadable: dict[Path, None]) -> Iterator[Path]:
    """A folder and all folders below it."""
    # Beside each folder, what identifies those that contain it: a link to one of them would never end.
    waiting = [(folder, frozenset[tuple[int, int]]())]
    while waiting:
        current, above = waiting.pop()
        try:
            status = current.stat()
        except OSError:
            unreadable[current] = None
            continue
        if (status.st_dev, status.st_ino) in above:
            continue
        yield current
        inside = above | {(status.st_dev, status.st_ino)}
        waiting += [(current / entry.name, inside) for entry in _entries(current, unreadable) if _is_folder(entry)]


def _entries(folder: Path, unreadable: dict[Path, None]) -> list[os.DirEntry[str]]:
    """Entries of a folder that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        unreadable[folder] = None
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
