"""Which classes a run trains on, and how shards' train ids become the run's."""

import difflib
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from dist_pca.config import DataConfig
from dist_pca.errors import UserError
from dist_pca.shards.classes import IGNORE_INDEX, LABEL_SETS, ClassInfo
from dist_pca.shards.manifest import Manifest


def class_table(config: DataConfig, sources: Sequence[Manifest], targets: Sequence[Manifest]) -> tuple[ClassInfo, ...]:
    """The run's classes by train id, in the first source's colours.

    Unlabelled targets have no say: none of their pixels carries a class.

    Raises:
        UserError: a source has no labels, a class that data.classes names is not in the shards, or data.classes is
            None while the folders' class names differ.
    """
    for source in sources:
        if not source.labelled:
            raise UserError(f"data.source: {source.folder} holds no labels; build the shards from a labelled data set")
    first, *others = (*sources, *(target for target in targets if target.labelled))
    table = chosen_classes(config, first)
    for other in others:
        names = ((info.name for info in classes) for classes in (table, chosen_classes(config, other)))
        for index, (name, its) in enumerate(zip_longest(*names)):
            if name != its:
                raise UserError(
                    f"data.source and data.target: class tables differ, first at train id {index}: {name or 'none'} in "
                    f"{first.folder}, {its or 'none'} in {other.folder}; name a common subset in data.classes"
                )
    return table


def chosen_classes(config: DataConfig, manifest: Manifest) -> tuple[ClassInfo, ...]:
    """The classes of a shard folder that data.classes takes, in the order it names them; all of them where it is None.

    Raises:
        UserError: data.classes names an unknown label set, no class, a class twice or a class that the shards lack.
    """
    if config.classes is None:
        return manifest.classes
    names = _names(config.classes)
    known = {info.name: info for info in manifest.classes}
    for name in names:
        if name not in known:
            raise UserError(
                f"data.classes: {name!r} is no class of {manifest.folder}{_nearest(name, known)}; "
                f"its classes are {', '.join(known) or 'none'}"
            )
    return tuple(known[name] for name in names)


def lookup_table(manifest: Manifest, classes: Sequence[ClassInfo]) -> npt.NDArray[np.uint8]:
    """256 entries that turn train ids of a shard folder's labels into those of `classes`, by name; others are ignored.

    Raises:
        UserError: the shards have none of the classes.
    """
    wanted = {info.name: train_id for train_id, info in enumerate(classes)}
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for train_id, info in enumerate(manifest.classes):
        table[train_id] = wanted.get(info.name, IGNORE_INDEX)
    if (table == IGNORE_INDEX).all():
        raise UserError(
            f"shards {manifest.folder}: none of the classes {', '.join(wanted)}, only "
            f"{', '.join(info.name for info in manifest.classes) or 'none'}; use shards with these classes"
        )
    return table


def _names(choice: tuple[str, ...] | str) -> tuple[str, ...]:
    if isinstance(choice, str):
        if choice not in LABEL_SETS:
            raise UserError(
                f"data.classes: no label set {choice!r}{_nearest(choice, LABEL_SETS)}; there are "
                f"{', '.join(LABEL_SETS)}, or write a list of class names"
            )
        return LABEL_SETS[choice]
    if not choice:
        raise UserError("data.classes: an empty list; name classes, or leave the key out to take all")
    for name in choice:
        if choice.count(name) > 1:
            raise UserError(f"data.classes: {name!r} is there twice; name each class once")
    return choice


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
