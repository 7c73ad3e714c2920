"""Class tables: class names in train-id order, and the colours in which they are displayed."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_pca.errors import UserError, nearest

IGNORE_INDEX = 255
"""Train id of pixels that belong to no class."""


@dataclass(frozen=True)
class ClassInfo:
    """A class: its name and its 8-bit RGB colour."""

    name: str
    color: tuple[int, int, int]


MAX_CLASSES = 254
"""Largest number of classes: label files are 8-bit with 255 for ignore."""


def check_classes(classes: Sequence[ClassInfo]) -> None:
    """Check a class table that was read from a file.

    Raises:
        ValueError: it has no class or too many, a name twice, or a colour that is not 8-bit; the message is one line.
    """
    if not 0 < len(classes) <= MAX_CLASSES:
        raise ValueError(f"{len(classes)} classes where 1 to {MAX_CLASSES} can be")
    seen: set[str] = set()
    for train_id, info in enumerate(classes):
        if info.name in seen:
            raise ValueError(f"class {train_id}: {info.name[:40]!r} is listed twice")
        if not all(0 <= value <= 255 for value in info.color):
            raise ValueError(f"class {train_id}: colour {list(info.color)} is not in 0..255")
        seen.add(info.name)


CITYSCAPES_CLASSES = (
    ClassInfo("road", (128, 64, 128)),
    ClassInfo("sidewalk", (244, 35, 232)),
    ClassInfo("building", (70, 70, 70)),
    ClassInfo("wall", (102, 102, 156)),
    ClassInfo("fence", (190, 153, 153)),
    ClassInfo("pole", (153, 153, 153)),
    ClassInfo("traffic light", (250, 170, 30)),
    ClassInfo("traffic sign", (220, 220, 0)),
    ClassInfo("vegetation", (107, 142, 35)),
    ClassInfo("terrain", (152, 251, 152)),
    ClassInfo("sky", (70, 130, 180)),
    ClassInfo("person", (220, 20, 60)),
    ClassInfo("rider", (255, 0, 0)),
    ClassInfo("car", (0, 0, 142)),
    ClassInfo("truck", (0, 0, 70)),
    ClassInfo("bus", (0, 60, 100)),
    ClassInfo("train", (0, 80, 100)),
    ClassInfo("motorcycle", (0, 0, 230)),
    ClassInfo("bicycle", (119, 11, 32)),
)
"""The 19 evaluation classes of Cityscapes, by train id, in the data set's own colours."""


def _without(names: tuple[str, ...], *left_out: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)


_CITYSCAPES_19 = tuple(info.name for info in CITYSCAPES_CLASSES)
_SYNTHIA_16 = _without(_CITYSCAPES_19, "terrain", "truck", "train")

LABEL_SETS: dict[str, tuple[str, ...]] = {
    "cityscapes_19": _CITYSCAPES_19,
    "synthia_16": _SYNTHIA_16,
    "synthia_13": _without(_SYNTHIA_16, "wall", "fence", "pole"),
}
"""Class names of each label set, in train-id order; all are Cityscapes classes."""


def label_set(name: str) -> tuple[ClassInfo, ...]:
    """Classes of a label set, with their Cityscapes colours.

    Raises:
        KeyError: no set in `LABEL_SETS` has this name.
    """
    wanted = LABEL_SETS[name]
    return tuple(info for info in CITYSCAPES_CLASSES if info.name in wanted)


def label_set_members(names: Sequence[str], classes: Sequence[ClassInfo]) -> dict[str, list[int]]:
    """Train ids of each named label set's classes.

    Raises:
        UserError: a label set is unknown or has a class that is not among `classes`.
    """
    train_ids = {info.name: train_id for train_id, info in enumerate(classes)}
    members = {}
    for name in names:
        if name not in LABEL_SETS:
            raise UserError(f"evaluation.label_sets: no label set {name!r}; the nearest is {nearest(name, LABEL_SETS)}")
        missing = [member for member in LABEL_SETS[name] if member not in train_ids]
        if missing:
            raise UserError(
                f"evaluation.label_sets: {name} needs {', '.join(missing)}, which are not classes of this run; "
                "remove the label set (evaluation.label_sets=[]) or add them to data.classes"
            )
        members[name] = [train_ids[member] for member in LABEL_SETS[name]]
    return members
