"""Recipes: how one data set's raw files become samples. Read from typed YAML; errors name the wrong key."""

import math
import re
from collections.abc import Hashable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from typing_extensions import Self

from dist_pca.classes import LABEL_SETS, ClassInfo, check_classes, label_set
from dist_pca.config.section import NonNegative, Positive, Section
from dist_pca.errors import UserError, explain, nearest
from dist_pca.resources import names as shipped_names
from dist_pca.resources import resource
from dist_pca.shards.bands import MAX_BANDS
from dist_pca.shards.images import Reading, ValueRange

IGNORE = "ignore"
"""Written in place of a class name; means no class."""

Byte = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Byte, Byte, Byte]


class NamedColor(Section):
    """A class name and an RGB colour."""

    name: str
    color: Color


class Pairing(Section):
    """Maps an image's path to its label's path, both relative to the data set's root."""

    match: str
    """Regular expression that must match the whole image path."""
    replace: str
    """Template of the label path, in which \\1, \\2, ... are the groups of `match`; if it ends in `.*`, the label has
    the extension of any image format."""

    @field_validator("match")
    @classmethod
    def _check_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return value


class Split(Section):
    """Images of one split and their labels."""

    images: tuple[str, ...] = Field(min_length=1)
    """Globs relative to the root; `**` spans folders. Hidden files and folders are no images, and files with an unknown
    extension are passed over."""
    label: Pairing | None = None
    """Where labels are; None if the split has no labels."""
    exclude: tuple[str, ...] = ()
    """Globs on image paths relative to the root, in which `*` spans folders, of images that are left out: those that a
    data set is known to have wrong. They need not match."""
    list_file: str | None = None
    """Text file below the root that lists the images of the split, one per line, as a path or the end of a path, with
    or without extension."""

    @field_validator("images")
    @classmethod
    def _check_globs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            parts = PurePosixPath(pattern).parts
            if not parts or pattern.startswith("/") or ".." in parts or not pattern.isprintable():
                raise ValueError(f"{pattern[:80]!r} is no glob below the root; give one such as images/**/*")
        return value


DRAWN_KINDS = ("coco", "labelme", "cityscapes_polygons")
"""Kinds of coding whose labels are JSON files of named shapes."""
DRAWN_KEYS = ("names", "skip", "background", "crowd")
"""Keys of a coding that those kinds alone have."""


class Coding(Section):
    """Meaning of the values in a label file."""

    kind: Literal["index", "channel", "color", "coco", "labelme", "cityscapes_polygons"]
    """`index`: one channel of ids, or a palette image whose palette indices are ids. `channel`: ids in one channel of
    an 8-bit or 16-bit image. `color`: each class has an RGB colour. `coco`: a COCO JSON file of polygons and run
    lengths for many images. `labelme`: a labelme JSON file for each image. `cityscapes_polygons`: a JSON file of
    Cityscapes or IDD for each image."""
    channel: NonNegative = 0
    """Index of the channel that `channel` reads."""
    ids: dict[NonNegative, str] = {}
    """Class name (or `ignore`) of each raw id; empty if ids are train ids already, with 255 for ignore."""
    colors: tuple[NamedColor, ...] = ()
    """Class names (or `ignore`) of colours for kind `color`; a class may have several colours."""
    other: Literal["ignore", "error"] = "error"
    """What to do with values that are not in the table."""
    names: dict[str, str] = {}
    """Class name (or `ignore`) of each label name, for kinds that are drawn; empty if label names are class names."""
    skip: tuple[str, ...] = ()
    """Label names whose objects are not drawn, so that what lies beneath them stays."""
    background: str | None = None
    """Class of pixels on which no object is drawn; None ignores them."""
    crowd: Literal["ignore", "class"] = "ignore"
    """Whether objects of kind `coco` with `iscrowd` are ignored pixels or of their class."""
    tolerance: Byte = 0
    """Largest difference in a channel (0 to 255) at which kind `color` takes the nearest colour of the table; for
    labels in a lossy format."""

    @model_validator(mode="after")
    def _check_table(self) -> Self:
        drawn = self.kind in DRAWN_KINDS
        if drawn and (self.ids or self.colors or self.tolerance or self.channel):
            raise ValueError(f"kind `{self.kind}` takes its table from `names`; remove ids, colors, channel, tolerance")
        given = next((key for key in DRAWN_KEYS if getattr(self, key) != type(self).model_fields[key].default), None)
        if given is not None and not drawn:
            raise ValueError(f"{given}: kind `{self.kind}` has no names; it is for {', '.join(DRAWN_KINDS)}")
        if self.crowd != "ignore" and self.kind != "coco":
            raise ValueError(f"crowd: kind `{self.kind}` has no crowds; it is for coco")
        if self.kind == "color" and (self.ids or not self.colors):
            raise ValueError("kind `color` takes its table from `colors`, not from `ids`")
        if self.kind != "color" and self.colors:
            raise ValueError(f"kind `{self.kind}` takes its table from `ids`, not from `colors`")
        if self.kind != "color" and self.tolerance:
            raise ValueError(f"tolerance: kind `{self.kind}` takes ids as they are; remove the key")
        if max(self.ids, default=0) > 65535:
            raise ValueError(f"ids: {max(self.ids)} does not fit in 16 bits")
        return self

    @property
    def class_names(self) -> list[str]:
        """Class names in the table, without `ignore`."""
        background = () if self.background is None else (self.background,)
        names = [*self.ids.values(), *(entry.name for entry in self.colors), *self.names.values(), *background]
        return [name for name in names if name != IGNORE]


class Recipe(Section):
    """How one data set becomes shards."""

    name: str
    version: Positive
    """Version of the recipe; increase it whenever the same raw files give other samples."""
    description: str = ""
    label_set: str | None = None
    """Name of a label set as the class table; alternatives are `classes` and `classes_file`."""
    classes: tuple[NamedColor, ...] = ()
    """Class table, in train-id order."""
    classes_file: str | None = None
    """YAML file below the root that holds the class table, a list of {name, color}."""
    bands: int | tuple[int, ...] | None = None
    """Bands of each file that are kept: a number, which all files must have, or a list of band numbers from 1, in the
    order in which they are stored. None converts images to RGB."""
    range: tuple[tuple[float, float], ...] | None = None
    """Values that are black and white in images of more than 8 bits: a pair, or a list of pairs for each of `bands`.
    Without it they are 16-bit of the full range."""
    clip: bool = False
    """Whether values outside `range` are taken as black and white; otherwise they are an error."""
    coding: Coding
    splits: dict[str, Split] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        given = [key for key in ("label_set", "classes", "classes_file") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"give one of label_set, classes and classes_file, got {', '.join(given) or 'none'}")
        if self.label_set is not None and self.label_set not in LABEL_SETS:
            raise ValueError(
                f"label_set: no set {self.label_set!r}; the nearest is {nearest(self.label_set, LABEL_SETS)}"
            )
        if self.classes_file is None:
            _check_table(self.coding, self._known_classes())
        return self

    @field_validator("bands", mode="before")
    @classmethod
    def _check_bands(cls, value: Any) -> Any:
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and not (numbers and all(type(one) is int and 1 <= one <= MAX_BANDS for one in numbers)):
            raise ValueError(f"give a number of bands, or a list of band numbers, from 1 to {MAX_BANDS}")
        return value

    @field_validator("range", mode="before")
    @classmethod
    def _as_pairs(cls, value: Any) -> Any:
        single = isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple))
        return [value] if single else value

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        pairs = self.range or ()
        if any(not -math.inf < low < high < math.inf for low, high in pairs):
            raise ValueError("range: give two numbers, the lower one first")
        bands = 1 if self.bands is None else self.reading.count
        if len(pairs) not in (0, 1, bands):
            raise ValueError(f"range: has {len(pairs)} pairs for {bands} `bands`; give one pair, or one per band")
        return self

    @property
    def reading(self) -> Reading:
        """How the recipe has images read."""
        bands, exact = self.bands, isinstance(self.bands, int)
        if isinstance(bands, int):
            bands = tuple(number + 1 for number in range(bands))
        values = tuple(ValueRange(low, high, self.clip) for low, high in self.range or ())
        return Reading(values, bands, exact)

    def _known_classes(self) -> tuple[ClassInfo, ...]:
        if self.label_set is not None:
            return label_set(self.label_set)
        return tuple(ClassInfo(entry.name, entry.color) for entry in self.classes)

    def class_table(self, root: Path, *, required: bool = True) -> tuple[ClassInfo, ...]:
        """Classes in train-id order, read from `classes_file` below `root` if the recipe has one.

        If they are not `required` (no labels are read), a missing file gives an empty table.

        Raises:
            UserError: the file is missing or not a class table, or the label coding has a class that is not in it.
        """
        if self.classes_file is None:
            return self._known_classes()
        path = root / self.classes_file
        if not path.is_file() and not required:
            return ()
        if not path.is_file():
            raise UserError(f"{path}: no such file; write the class table there, a YAML list of {{name, color}}")
        try:
            entries = TypeAdapter(tuple[NamedColor, ...]).validate_python(_load_yaml(path))
            classes = tuple(ClassInfo(entry.name, entry.color) for entry in entries)
            _check_table(self.coding, classes)
        except ValidationError as error:
            raise UserError(f"{path}: {_explain(error)}") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return classes

    def split(self, name: str | None) -> str:
        """Check the name of a split; None selects the only one.

        Raises:
            UserError: there is no such split, or there are several and `name` is None.
        """
        names = ", ".join(self.splits)
        if name is None and len(self.splits) == 1:
            return next(iter(self.splits))
        if name is None:
            raise UserError(f"recipe {self.name}: has several splits, {names}; choose one with --split")
        if name not in self.splits:
            raise UserError(
                f"recipe {self.name}: no split {name!r}; the nearest is {nearest(name, self.splits)}, all are {names}"
            )
        return name


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe: a shipped one by name, or a YAML file by path.

    Raises:
        UserError: there is no such recipe, the file is not YAML, a key is unknown (the message names the nearest one)
            or missing, or a value is invalid.
    """
    path = Path(name) if Path(name).suffix in {".yaml", ".yml"} else resource("shards", str(name))
    if not path.is_file():
        shipped = nearest(path.stem, shipped_names("shards"))
        raise UserError(f"recipe {path}: no such file; the nearest of the shipped recipes is {shipped}")
    try:
        return Recipe.model_validate(_load_yaml(path))
    except ValidationError as error:
        raise UserError(f"recipe {path}: {_explain(error)}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, a likely mistake in a table of ids, which YAML would accept."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error


def _check_table(coding: Coding, classes: tuple[ClassInfo, ...]) -> None:
    check_classes(classes)
    names = [info.name for info in classes]
    for name in coding.class_names:
        if name not in names:
            raise ValueError(f"coding: no class {name!r}; the nearest is {nearest(name, [*names, IGNORE])!r}")


def _explain(error: ValidationError) -> str:
    # A misspelt key is also reported as missing; the misspelling is the more useful error.
    detail = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    parents = "".join(f"{part}." for part in detail["loc"][:-1])
    sections = (Recipe, Split, Pairing, Coding, NamedColor)
    return explain([detail], {parents + field for section in sections for field in section.model_fields})
