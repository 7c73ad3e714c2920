"""Find the samples among raw files: globs, split lists, selection, and each image's label."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath

from typing_extensions import TypedDict

from dist_pca.errors import UserError
from dist_pca.shards.coco import CocoImage, index_coco
from dist_pca.shards.find import described, find_images
from dist_pca.shards.images import SUFFIXES
from dist_pca.shards.recipe import Pairing, Recipe, Split

_LONGEST_KEY = 80  # with ".label.png" a key must fit in the 100 characters of a tar header


@dataclass(frozen=True)
class RawSample:
    """An image and its label, as paths relative to the root, and their key in a shard."""

    key: str
    image: str
    label: str | None
    coco: CocoImage | None = None
    """Entry of the image in its label, a COCO file; None if the label is another or has no such entry."""


class Selection(TypedDict, total=False):
    """Options of `scan` that choose among the files of a split, documented there."""

    include: Sequence[str]
    exclude: Sequence[str]
    unlabelled: bool


@dataclass(frozen=True)
class Scan:
    """Samples of a split, sorted by path, and what else matches its globs."""

    samples: tuple[RawSample, ...]
    passed_over: str
    """Number of those files, and of images that the recipe excludes, by reason; empty if there are none."""


def scan(
    recipe: Recipe,
    root: Path,
    split: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unlabelled: bool = False,
    need_labels: bool = True,
) -> Scan:
    """List a split's samples.

    Args:
        recipe: Layout of the data set.
        root: The data set's folder.
        split: One of the recipe's splits.
        include: Globs on image paths relative to `root`, in which `*` spans folders; an image must match one of them.
        exclude: Globs of the same kind; an image must match none of them.
        unlabelled: Do not look for labels.
        need_labels: Whether a missing label file is an error; if not, its sample is listed anyway.

    Raises:
        UserError: the root is missing, nothing is selected, a listed image does not exist, or labels are missing
            (the message names the first one).
    """
    if not root.is_dir():
        raise UserError(f"root {root}: no such folder; give the folder that holds the raw data set")
    rules = recipe.splits[split]
    found = find_images(root, rules.images, recipe.reading.suffixes)
    passed_over = described(found.passed_over, root)
    if not found.images:
        raise UserError(
            f"root {root}: no image matches {', '.join(rules.images)} (recipe {recipe.name}, split {split}); "
            f"{_remedy(root, rules, recipe, passed_over)}"
        )
    images = [path.relative_to(root).as_posix() for path in found.images]
    if rules.list_file is not None:
        images = _listed(images, root / rules.list_file)
    listed, images = images, [image for image in images if not _matches(image, rules.exclude)]
    if not images:
        raise UserError(f"recipe {recipe.name}: splits.{split}.exclude leaves none of {len(listed)} images; narrow it")
    if len(images) < len(listed):
        left_out = f"{len(listed) - len(images)} images that the recipe excludes"
        passed_over = f"{passed_over}, {left_out}" if passed_over else left_out
    images = _selected(images, include, exclude)
    keys = unique_keys(images)
    if unlabelled or rules.label is None:
        labels: list[str | None] = [None] * len(images)
    else:
        labels = [*_labels(root, images, rules.label, recipe, need_labels)]
    samples = [RawSample(*sample) for sample in zip(keys, images, labels, strict=True)]
    if recipe.coding.kind == "coco":
        samples = _with_entries(root, samples, need_labels)
    return Scan(tuple(samples), passed_over)


def _labels(root: Path, images: Sequence[str], pairing: Pairing, recipe: Recipe, needed: bool) -> list[str]:
    files = lru_cache(maxsize=64)(_files_by_stem)
    labels = [_label_file(root, _label_of(image, pairing, recipe), files) for image in images]
    missing = [(image, label) for image, label in zip(images, labels, strict=True) if not (root / label).is_file()]
    if missing and (needed or len(missing) == len(images)):
        image, label = missing[0]
        raise UserError(
            f"root {root}: {len(missing)} of {len(images)} images have no label, the first is {image} "
            f"(expected {label}); add the labels, leave the images out with --exclude or --on-error skip, "
            "or build with --unlabelled"
        )
    return labels


def _with_entries(root: Path, samples: Sequence[RawSample], needed: bool) -> list[RawSample]:
    """Add the entries of their COCO files, each of which is read once."""
    images: dict[str, list[str]] = {}
    for sample in samples:
        if sample.label is not None and (root / sample.label).is_file():
            images.setdefault(sample.label, []).append(sample.image)
    entries = {label: index_coco(root / label, members) for label, members in images.items()}
    for label, members in images.items():
        missing = [image for image in members if image not in entries[label]]
        if missing and (needed or len(missing) == len(members)):
            raise UserError(
                f"{root / label}: {len(missing)} of {len(members)} images have no entry, the first is {missing[0]}; "
                "add the entries, leave the images out with --exclude or --on-error skip, or build with --unlabelled"
            )
    return [replace(sample, coco=entries.get(sample.label or "", {}).get(sample.image)) for sample in samples]


def _label_file(root: Path, label: str, files: Callable[[Path], dict[str, list[str]]]) -> str:
    """Path of a label relative to the root, the extension found if it is `.*`."""
    if not label.endswith(".*"):
        return label
    folder, _, stem = label[:-2].rpartition("/")
    names = files(root / folder).get(stem, [])
    if len(names) > 1:
        raise UserError(f"root {root}: labels {' and '.join(names)} in {folder} are of the same image; remove one")
    return label if not names else f"{folder}/{names[0]}" if folder else names[0]


def _files_by_stem(folder: Path) -> dict[str, list[str]]:
    """Names of a folder's image files by name without extension."""
    names: dict[str, list[str]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                names.setdefault(path.stem, []).append(path.name)
    return names


def _remedy(root: Path, rules: Split, recipe: Recipe, passed_over: str) -> str:
    if passed_over:
        return f"passed over there: {passed_over}; convert them to a format that can be read, such as PNG"
    # Archives are often unpacked one folder too deep.
    folders = (folder for folder in sorted(root.iterdir()) if folder.is_dir())
    suffixes = recipe.reading.suffixes
    lower = next((folder for folder in folders if find_images(folder, rules.images, suffixes).images), None)
    if lower is not None:
        return f"give {lower} as the root, which has matching images"
    held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    return f"the root contains {held}; arrange the files as in the recipe, or give the folder where they are"


def _listed(images: Sequence[str], path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the recipe reads the list of the split's images from it")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error}); save it as such") from None
    wanted = {line for line in lines if line and not line.startswith("#")}
    if not wanted:
        raise UserError(f"{path}: lists no image; write one per line")
    named = {image: wanted.intersection(_names(image)) for image in images}
    unknown = wanted.difference(*named.values())
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(wanted)} lines match no image, the first is {min(unknown)!r}; "
            "write paths relative to the root, or the ends of paths"
        )
    return [image for image in images if named[image]]


def _names(image: str) -> Iterable[str]:
    parts = PurePosixPath(image).parts
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        yield tail
        yield tail.rpartition(".")[0]


def _selected(images: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    for option, globs in (("--include", include), ("--exclude", exclude)):
        for pattern in globs:
            if not any(fnmatchcase(image, pattern) for image in images):
                raise UserError(f"{option} {pattern!r}: matches none of {len(images)} images, such as {images[0]}")
    kept = [image for image in images if (not include or _matches(image, include)) and not _matches(image, exclude)]
    if not kept:
        raise UserError(f"--include and --exclude leave none of {len(images)} images; widen one or narrow the other")
    return kept


def _matches(image: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(image, pattern) for pattern in globs)


def _label_of(image: str, pairing: Pairing, recipe: Recipe) -> str:
    match = re.fullmatch(pairing.match, image)
    if match is None:
        raise UserError(f"recipe {recipe.name}: label.match {pairing.match!r} does not match the image {image}")
    try:
        label = match.expand(pairing.replace)
    except (re.error, IndexError) as error:
        raise UserError(f"recipe {recipe.name}: label.replace {pairing.replace!r} is no template ({error})") from None
    if label.startswith("/") or ".." in PurePosixPath(label).parts:
        raise UserError(f"recipe {recipe.name}: label.replace gives {label!r}, which is outside the root; change it")
    return label


def unique_keys(images: Sequence[str]) -> list[str]:
    """WebDataset keys of images: the path without its extension; if long or not unique, shortened with a digest."""
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", image.rpartition(".")[0]) for image in images]
    count = Counter(plain)
    return [
        key if count[key] == 1 and len(key) <= _LONGEST_KEY else f"{key[: _LONGEST_KEY - 17]}-{_digest(image)}"
        for key, image in zip(plain, images, strict=True)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
