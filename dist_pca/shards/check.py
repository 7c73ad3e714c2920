"""Check a raw data set before shards are built from it: what a build would refuse, and warnings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from typing_extensions import Unpack

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.bands import Picture
from dist_pca.shards.images import describe_file, open_image
from dist_pca.shards.labels import Table, count_values, label_table, shown_code, train_id_of
from dist_pca.shards.pool import Progress, Report, run_jobs
from dist_pca.shards.recipe import Coding, Recipe, load_recipe
from dist_pca.shards.sample import MAX_PIXELS
from dist_pca.shards.scan import RawSample, Scan, Selection, scan
from dist_pca.shards.writer import read_label_of

_SAMPLES_PER_JOB = 16
_MOST_UNKNOWN = 64
"""Label values outside the coding that are kept of each label, the most frequent ones."""
_HASH_EDGE = 16
_FEWEST_EDGES = 24
"""Bits that are set, and that are not, in a hash that says enough about an image."""
_NEAR_BITS = 24
"""Bits in which near-duplicates may differ, of 256."""
_HASHES_AT_ONCE = 512


@dataclass(frozen=True)
class Refusal:
    """A file that a build would refuse, or a whole split if `file` is empty."""

    split: str
    file: str
    problem: str


@dataclass(frozen=True)
class LabelValue:
    """A raw value or a label name in the labels of a split."""

    value: str
    meaning: str
    """Class name, `ignore`, or `not in the coding`."""
    share: float
    """Share of all label pixels; 0 to 1."""
    images: int


@dataclass(frozen=True)
class SplitCheck:
    """What the files of one split are."""

    name: str
    images: int
    labelled: bool
    passed_over: str
    formats: dict[str, int]
    """Number of images by format and mode, such as `PNG RGB`."""
    orientations: dict[int, int]
    """Number of images by EXIF orientation, if it is not 1."""
    sizes: int
    """Number of different sizes."""
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    """Width and height of the upright image with the most pixels."""
    darkest: int | None
    brightest: int | None
    """Lowest and highest 8-bit value of any image."""
    label_values: list[LabelValue]
    empty_classes: list[str]


@dataclass(frozen=True)
class Check:
    """Result of a check: facts by split, what a build would refuse, and warnings."""

    root: str
    recipe: str
    splits: list[SplitCheck]
    problems: list[Refusal]
    warnings: list[str]


@dataclass(frozen=True)
class _Job:
    root: Path
    samples: tuple[RawSample, ...]
    recipe: Recipe
    classes: tuple[ClassInfo, ...]
    max_pixels: int


@dataclass(frozen=True)
class _Facts:
    """What one sample is; `problem` alone if its image cannot be read."""

    problem: str = ""
    kind: str = ""
    orientation: int = 1
    size: tuple[int, int] | None = None
    extremes: tuple[int, int] = (0, 0)
    digest: bytes = b""
    """Perceptual hash; empty if the image has too few edges for one."""


@dataclass(frozen=True)
class _Examined:
    """What the samples of a job are, and the values of all their labels."""

    facts: list[_Facts]
    pixels: Counter[int | str]
    """Label pixels of each raw value or label name."""
    images: Counter[int | str]
    """Labels that have it."""
    label_pixels: int
    """Pixels of all labels."""


def check_raw(
    recipe: Recipe | str | Path,
    root: str | Path,
    *,
    split: str | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: Progress | None = None,
    **selection: Unpack[Selection],
) -> Check:
    """Decode all images and labels of a raw data set, and describe them without writing anything.

    Args:
        recipe: A recipe, or a shipped one's name, or the path of a YAML file.
        root: Folder of the raw data set.
        split: Name of a split; None checks all of them, and looks for near-duplicates between them.
        max_pixels: Larger images are refused.
        workers: Processes; None is one per core.
        progress: Called from time to time with images done, images in total, and 0.
        selection: Options of `scan`, as for a build.

    Raises:
        UserError: the recipe or the root is wrong, or no split has an image.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    root = Path(root)
    scans: dict[str, Scan] = {}
    refused: list[UserError] = []
    for name in recipe.splits if split is None else [recipe.split(split)]:
        try:
            scans[name] = scan(recipe, root, name, need_labels=False, **selection)
        except UserError as error:
            refused.append(error)
    if not scans:
        raise refused[0]
    tables = {
        name: recipe.class_table(root, required=found.samples[0].label is not None) for name, found in scans.items()
    }
    jobs, places = [], []
    for name, found in scans.items():
        for start in range(0, len(found.samples), _SAMPLES_PER_JOB):
            part = found.samples[start : start + _SAMPLES_PER_JOB]
            jobs.append(_Job(root, part, recipe, tables[name], max_pixels))
            places.append(name)
    total = sum(len(found.samples) for found in scans.values())
    results = run_jobs(_examine, jobs, total=total, workers=workers, progress=progress)
    splits, problems = [], []
    # A split that was not downloaded is none of the others' business.
    warnings = [str(error) for error in refused]
    facts: dict[str, list[_Facts]] = {}
    for name, found in scans.items():
        examined = [result for place, result in zip(places, results, strict=True) if place == name]
        facts[name] = [fact for part in examined for fact in part.facts]
        summary = _summary(name, found, examined, recipe.coding, tables[name])
        splits.append(summary)
        for sample, fact in zip(found.samples, facts[name], strict=True):
            if fact.problem:
                problems.append(Refusal(name, sample.image, fact.problem.replace(f"{root}/", "")))
        if summary.empty_classes and len(summary.empty_classes) == len(tables[name]):
            problems.append(Refusal(name, "", "no label has a pixel of any class"))
        warnings += _warnings(summary)
    warnings += _near_duplicates({name: found.samples for name, found in scans.items()}, facts)
    return Check(str(root), recipe.name, splits, problems, warnings)


def _examine(job: _Job, report: Report) -> _Examined:
    table = label_table(job.recipe.coding, job.classes) if job.samples[0].label is not None else {}
    facts, pixels, images, label_pixels = [], Counter[int | str](), Counter[int | str](), 0
    for raw in job.samples:
        try:
            fact, values = _facts(job, raw, table)
        except UserError as error:
            fact, values = _Facts(problem=str(error)), {}
        facts.append(fact)
        label_pixels += sum(values.values())
        known = {value: count for value, count in values.items() if train_id_of(value, table) is not None}
        # A photograph in place of a label has a value for nearly every pixel.
        unknown = Counter({value: count for value, count in values.items() if value not in known})
        values = known | dict(unknown.most_common(_MOST_UNKNOWN))
        pixels.update(values)
        images.update(values.keys())
        report(1, 0)
    return _Examined(facts, pixels, images, label_pixels)


def _facts(job: _Job, raw: RawSample, table: Table) -> tuple[_Facts, dict[int | str, int]]:
    """What a sample is, and the pixels of each raw value or name of its label."""
    kind, orientation = describe_file(job.root / raw.image, job.recipe.reading, job.max_pixels)
    image = open_image(job.root / raw.image, job.recipe.reading, job.max_pixels)
    values: dict[int | str, int] = {}
    problem = ""
    try:
        if raw.label is not None:
            values = count_values(job.root, raw, job.recipe.coding, image.size, job.max_pixels)
            read_label_of(image, job.root, raw, job.recipe, table, job.max_pixels)
    except UserError as error:
        problem = str(error)
    bounds = np.ravel(image.getextrema())
    return _Facts(
        problem=problem,
        kind=kind,
        orientation=orientation,
        size=image.size,
        extremes=(int(bounds.min()), int(bounds.max())),
        digest=_hash(image),
    ), values


def _hash(image: Picture) -> bytes:
    """Hash of 256 bits, each of which says whether one part of an image is brighter than the next; empty if flat."""
    small = image.convert("L").resize((_HASH_EDGE + 1, _HASH_EDGE), Image.Resampling.BOX)
    bits = np.diff(np.asarray(small, np.int16), axis=1) > 0
    return np.packbits(bits).tobytes() if _FEWEST_EDGES <= bits.sum() <= bits.size - _FEWEST_EDGES else b""


def _summary(
    name: str, found: Scan, examined: Sequence[_Examined], coding: Coding, classes: tuple[ClassInfo, ...]
) -> SplitCheck:
    read = [fact for part in examined for fact in part.facts if fact.size is not None]
    sizes = {fact.size for fact in read if fact.size is not None}
    labelled = found.samples[0].label is not None
    pixels, images = Counter[int | str](), Counter[int | str]()
    for part in examined:
        pixels.update(part.pixels)
        images.update(part.images)
    label_pixels = sum(part.label_pixels for part in examined)
    table = label_table(coding, classes) if labelled else {}
    values, covered = [], set[int | None]()
    for value, count in pixels.most_common():
        train_id = train_id_of(value, table)
        covered.add(train_id)
        if train_id is None:
            meaning = "not in the coding"
        else:
            meaning = "ignore" if train_id == IGNORE_INDEX else classes[train_id].name
        values.append(LabelValue(shown_code(value, coding), meaning, count / label_pixels, images[value]))
    empty = [info.name for index, info in enumerate(classes) if index not in covered] if values else []
    return SplitCheck(
        name=name,
        images=len(found.samples),
        labelled=labelled,
        passed_over=found.passed_over,
        formats=dict(Counter(fact.kind for fact in read).most_common()),
        orientations=dict(Counter(fact.orientation for fact in read if fact.orientation != 1)),
        sizes=len(sizes),
        smallest=min(sizes, key=lambda size: size[0] * size[1], default=None),
        largest=max(sizes, key=lambda size: size[0] * size[1], default=None),
        darkest=min((fact.extremes[0] for fact in read), default=None),
        brightest=max((fact.extremes[1] for fact in read), default=None),
        label_values=values,
        empty_classes=empty,
    )


def _warnings(found: SplitCheck) -> list[str]:
    lines = []
    if found.passed_over:
        lines.append(f"split {found.name}: passed over {found.passed_over}")
    if found.empty_classes and {entry.value for entry in found.label_values} == {"0", "255"}:
        lines.append(f"split {found.name}: labels hold 0 and 255 alone; if 255 is a class, name it in `coding.ids`")
    if found.empty_classes:
        lines.append(f"split {found.name}: no label has a pixel of {', '.join(found.empty_classes)}")
    if found.orientations:
        count = sum(found.orientations.values())
        lines.append(f"split {found.name}: {count:,} images are turned upright by their EXIF orientation")
    if found.brightest is not None and found.brightest < 64:
        lines.append(f"split {found.name}: no image is brighter than {found.brightest} of 255")
    return lines


def _near_duplicates(samples: dict[str, tuple[RawSample, ...]], facts: dict[str, list[_Facts]]) -> list[str]:
    lines = []
    for first, second in combinations(samples, 2):
        names: list[list[str]] = []
        hashes: list[npt.NDArray[np.float32]] = []
        for name in (first, second):
            pairs = [(raw.image, fact.digest) for raw, fact in zip(samples[name], facts[name], strict=True)]
            names.append([image for image, digest in pairs if digest])
            digests = np.frombuffer(b"".join(digest for _, digest in pairs), np.uint8)
            hashes.append(np.unpackbits(digests).reshape(-1, _HASH_EDGE**2).astype(np.float32) * 2 - 1)
        if not all(names):
            continue
        alike: list[tuple[str, str]] = []
        for start in range(0, len(hashes[1]), _HASHES_AT_ONCE):
            # Of vectors of -1 and 1, the product counts equal bits minus different ones.
            near = hashes[1][start : start + _HASHES_AT_ONCE] @ hashes[0].T >= _HASH_EDGE**2 - 2 * _NEAR_BITS
            alike += [
                (names[1][start + row], names[0][near[row].argmax()]) for row in near.any(axis=1).nonzero()[0].tolist()
            ]
        # Splits that are made of the same files, such as one by night and all of them, are meant to overlap.
        alike = [pair for pair in alike if pair[0] != pair[1]]
        if alike:
            lines.append(
                f"splits {first} and {second}: {len(alike):,} images of {second} look like one of {first}, such as "
                f"{' and '.join(alike[0])}"
            )
    return lines
