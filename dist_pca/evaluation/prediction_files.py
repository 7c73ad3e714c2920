"""Predictions of shards as files for a benchmark's server: values in its coding, names of the source files."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.distributed import barrier, gather_objects, is_rank0
from dist_pca.errors import UserError, nearest
from dist_pca.evaluation.label_files import save_whole
from dist_pca.evaluation.pictures import color_labels
from dist_pca.files import new_folder
from dist_pca.resources import names as resource_names
from dist_pca.shards.manifest import Manifest
from dist_pca.shards.recipe import load_recipe

Pixels = npt.NDArray[np.uint8]
Coding = Literal["label-ids", "train-ids", "colors"]
_CITYSCAPES_FRAME = re.compile(r"(?:^|[_/])([A-Za-z-]+_\d{6}_\d{6}_leftImg8bit)$")
_LONGEST_NAME = 240


class Values(NamedTuple):
    """What files hold for each train id."""

    table: Pixels
    """Value of each of 256 train ids, or their colours, 256 x 3."""
    description: str
    """The coding in words."""


def prediction_values(classes: Sequence[ClassInfo], coding: Coding | None, manifest: Manifest | None = None) -> Values:
    """Choose the values of prediction files.

    Args:
        classes: Classes of the run by train id.
        coding: Cityscapes label ids by class name, train ids, or RGB in the classes' colours. None is the coding of
            the labels that the shards' recipe reads if these are train ids of the Cityscapes classes (ACDC), and
            otherwise label ids if all classes have one.
        manifest: The shards that are predicted. Train ids are those of their class table if it has all classes, as a
            server needs them, and otherwise the run's own.

    Raises:
        UserError: label ids are asked for, and a class has none.
    """
    label_ids = {name: value for value, name in load_recipe("cityscapes").coding.ids.items()}
    other = [info.name for info in classes if info.name not in label_ids]
    if coding == "label-ids" and other:
        raise UserError(
            f"--coding label-ids: {other[0]!r} is not a class of Cityscapes, whose nearest is "
            f"{nearest(other[0], label_ids)!r}; use --coding train-ids or colors, or train with Cityscapes' names"
        )
    if coding == "colors":
        return Values(color_labels(np.arange(256, dtype=np.uint8), classes), "colours of the classes")
    if coding == "label-ids" or (coding is None and not other and not (manifest and _has_train_ids(manifest.recipe))):
        return Values(_table([label_ids[info.name] for info in classes]), "Cityscapes ids")
    reason = ", as not all classes are in Cityscapes" if coding is None and other else ""
    theirs = [info.name for info in manifest.classes] if manifest else []
    if theirs and all(info.name in theirs for info in classes):
        return Values(_table([theirs.index(info.name) for info in classes]), f"train ids of the shards{reason}")
    return Values(_table(range(len(classes))), f"train ids of the run{reason}")


@contextmanager
def prediction_folder(folder: Path, values: Values) -> Iterator[Callable[[str, str, Pixels], None]]:
    """Create a folder of predictions, and yield a function that saves one: `save(key, source, train_ids)`.

    Files get the names of their sources at the end. Collective if torch.distributed is initialised: all ranks write
    into the folder, which appears when it is complete.

    Args:
        folder: The folder; if it exists, it must be empty.
        values: What the files hold.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    sources: dict[str, str] = {}
    with new_folder(folder, "--write-predictions") as staged:

        def save(key: str, source: str, train_ids: Pixels) -> None:
            save_whole(staged / ".keys" / f"{key}.png", Image.fromarray(values.table[train_ids]))
            sources[key] = source

        yield save
        gathered = gather_objects(sources)
        if is_rank0():
            everything = {key: source for part in gathered for key, source in part.items()}
            for key, name in prediction_names(everything).items():
                (staged / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
                (staged / ".keys" / f"{key}.png").rename(staged / f"{name}.png")
            _remove_empty(staged / ".keys")
        barrier()


def prediction_names(sources: Mapping[str, str]) -> dict[str, str]:
    """File name, without extension, of each sample's prediction, by key.

    It is the name of the sample's source file, which servers ask for; or the source's whole path, in folders, if two
    sources have the same name; or the key, if a source is not known.

    Args:
        sources: Path of each sample's source file by key, untrusted; empty where it is not known.
    """
    paths = {key: _path(source) or _path(f"{key}.png") or key for key, source in sources.items()}
    frames = {key: _CITYSCAPES_FRAME.search(path) for key, path in paths.items()}
    stems = {key: (frame[1] if (frame := frames[key]) else path.rpartition("/")[2]) for key, path in paths.items()}
    for names in (stems, paths):
        # Some file systems do not distinguish case.
        if len({name.casefold() for name in names.values()}) == len(names):
            return names
    return {key: key for key in sources}


def _path(source: str) -> str | None:
    """Path of a source file without extension; None unless all of its parts are names that a file may have."""
    parts = PurePosixPath(source).with_suffix("").parts if source.strip("/.") else ()
    sound = all(
        part not in ("..", "/") and part.isprintable() and len(part.encode(errors="replace")) <= _LONGEST_NAME
        for part in parts
    )
    # The part that begins with a dot would be a hidden file.
    return "/".join(parts) if parts and sound and not any(part.startswith(".") for part in parts) else None


def _table(values: Sequence[int]) -> Pixels:
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[: len(values)] = values
    return table


def _has_train_ids(recipe: str) -> bool:
    if recipe not in resource_names("shards"):
        return False
    read = load_recipe(recipe)
    return read.label_set is not None and read.coding.kind == "index" and not read.coding.ids


def _remove_empty(folder: Path) -> None:
    if folder.is_dir():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        folder.rmdir()
