"""The classes that a run trains on, and the conversion of shards' train ids to the run's."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from dist_pca.classes import IGNORE_INDEX, LABEL_SETS, ClassInfo
from dist_pca.config import DataConfig
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest


def class_table(config: DataConfig, sources: Sequence[Manifest], targets: Sequence[Manifest]) -> tuple[ClassInfo, ...]:
    """Classes of the run by train id, in the first source's colours.

    Class tables of unlabelled targets are ignored.

    Raises:
        UserError: a source has no labels, a class in data.classes is not in the shards, or data.classes is None and
            the folders' class names differ.
    """
    for source in sources:
        if not source.labelled:
            raise UserError(f"data.source: {source.folder} has no labels; build the shards from a labelled data set")
    first, *others = (*sources, *(target for target in targets if target.labelled))
    table = chosen_classes(config, first)
    for other in others:
        names = ((info.name for info in classes) for classes in (table, chosen_classes(config, other)))
        for index, (name, its) in enumerate(zip_longest(*names)):
            if name != its:
                raise UserError(
                    f"data.source and data.target: class tables differ, first at train id {index}: {name or 'none'} in "
                    f"{first.folder}, {its or 'none'} in {other.folder}; set data.classes to a common subset"
                )
    return table


def chosen_classes(config: DataConfig, manifest: Manifest) -> tuple[ClassInfo, ...]:
    """Classes of a shard folder that data.classes selects, in its order; all of them if it is None.

    Raises:
        UserError: data.classes is an unknown label set or empty, or has a class twice or a class that is not in the
            shards.
    """
    if config.classes is None:
        return manifest.classes
    names = _names(config.classes)
    known = {info.name: info for info in manifest.classes}
    for name in names:
        if name not in known:
            raise UserError(
                f"data.classes: {name!r} is not a class of {manifest.folder}{_nearest(name, known)}; "
                f"its classes are {', '.join(known) or 'none'}"
            )
    return tuple(known[name] for name in names)


def lookup_table(
    manifest: Manifest, classes: Sequence[ClassInfo], class_map: Mapping[str, str] | None = None
) -> npt.NDArray[np.uint8]:
    """Build a table of 256 entries from a shard folder's train ids to those of `classes`, by name; others are ignored.

    Args:
        manifest: The shards.
        classes: Classes by train id.
        class_map: Name in `classes` by name in the shards, for names that differ.

    Raises:
        UserError: the shards have none of the classes, or `class_map` has a name that does not exist.
    """
    wanted = {info.name: train_id for train_id, info in enumerate(classes)}
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for train_id, name in enumerate(_mapped_names(manifest, classes, class_map or {})):
        table[train_id] = wanted.get(name, IGNORE_INDEX)
    if (table == IGNORE_INDEX).all():
        raise UserError(
            f"shards {manifest.folder}: none of the classes {', '.join(wanted)}, only "
            f"{', '.join(info.name for info in manifest.classes) or 'none'}; use shards with these classes, or map "
            "their names with --class-map (evaluation.class_map)"
        )
    return table


def missing_classes(
    manifest: Manifest, classes: Sequence[ClassInfo], class_map: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Names in `classes` that the shards do not have, each with the most similar name that only the shards have.

    The similar name is None if none is spelled alike. Case, spaces, hyphens and underscores count little.

    Raises:
        UserError: `class_map` has a name that does not exist.
    """
    there = _mapped_names(manifest, classes, class_map or {})
    names = {info.name for info in classes}
    others = {_plain(name): name for name in there if name not in names}
    missing = {}
    for name in (info.name for info in classes if info.name not in there):
        similar = difflib.get_close_matches(_plain(name), list(others), n=1, cutoff=0.8)
        missing[name] = others[similar[0]] if similar else None
    return missing


def describe_missing(manifest: Manifest, missing: Mapping[str, str | None]) -> list[str]:
    """Warnings about the result of `missing_classes`, each one line."""
    lines = [
        f"shards {manifest.folder}: no class {name!r}; the nearest is {similar!r}: if it is the same class, add "
        f"--class-map {f'{similar}={name}'!r} (evaluation.class_map)"
        for name, similar in missing.items()
        if similar is not None
    ]
    if missing:
        lines.append(f"shards {manifest.folder}: without {', '.join(missing)}, which the means therefore leave out")
    return lines


def _mapped_names(manifest: Manifest, classes: Sequence[ClassInfo], class_map: Mapping[str, str]) -> list[str]:
    """Names of the shards' classes by train id, those in `class_map` replaced."""
    names = [info.name for info in manifest.classes]
    known = [info.name for info in classes]
    for name, other in class_map.items():
        for part, where, choice in ((name, f"the shards {manifest.folder}", names), (other, "the run", known)):
            if part not in choice:
                raise UserError(
                    f"evaluation.class_map {f'{name}={other}'!r}: {part!r} is not a class of {where}"
                    f"{_nearest(part, choice)}; its classes are {', '.join(choice) or 'none'}"
                )
    return [class_map.get(name, name) for name in names]


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\W_]+", name.casefold())).strip()


def _names(choice: tuple[str, ...] | str) -> tuple[str, ...]:
    if isinstance(choice, str):
        if choice not in LABEL_SETS:
            raise UserError(
                f"data.classes: no label set {choice!r}{_nearest(choice, LABEL_SETS)}; "
                f"give {', '.join(LABEL_SETS)}, or a list of class names"
            )
        return LABEL_SETS[choice]
    if not choice:
        raise UserError("data.classes: the list is empty; give class names, or remove the key to use all classes")
    for name in choice:
        if choice.count(name) > 1:
            raise UserError(f"data.classes: {name!r} occurs twice; give each class once")
    return choice


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
