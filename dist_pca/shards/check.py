"""Check a raw data set before shards are built from it: what a build would refuse, and what is odd."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_pca.classes import IGNORE_INDEX, ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.images import ValueRange, open_header
from dist_pca.shards.labels import Table, count_values, label_table, shown_code
from dist_pca.shards.pool import Progress, Report, run_jobs
from dist_pca.shards.recipe import Coding, Recipe, load_recipe
from dist_pca.shards.sample import orientation
from dist_pca.shards.scan import RawSample, scan
from dist_pca.shards.writer import read_pair

_SAMPLES_PER_JOB = 16
_HASH_EDGE = 16
_FEWEST_EDGES = 24
"""Bits that are set, and that are not, in a hash that says enough about an image."""
_NEAR_BITS = 24
"""Bits in which near-duplicates may differ, of 256."""
_HASHES_AT_ONCE = 512


@dataclass(frozen=True)
class Problem:
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
    """Result of a check: facts by split, what a build would refuse, and what is odd."""

    root: str
    recipe: str
    splits: list[SplitCheck]
    problems: list[Problem]
    odd: list[str]

    def to_dict(self) -> dict[str, object]:
        """Convert to plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    root: Path
    samples: tuple[RawSample, ...]
    coding: Coding
    classes: tuple[ClassInfo, ...]
    values: ValueRange | None


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
    codes: dict[int | str, int] = field(default_factory=dict)
    """Pixels of each raw label value or name."""


def check_raw(
    recipe: Recipe | str | Path,
    root: str | Path,
    *,
    split: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unlabelled: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Check:
    """Decode all images and labels of a raw data set, and describe them without writing anything.

    Args:
        recipe: A recipe, or a shipped one's name, or the path of a YAML file.
        root: Folder of the raw data set.
        split: Name of a split; None checks all of them, and looks for near-duplicates between them.
        include: Globs on image paths, as for a build.
        exclude: Globs of the same kind.
        unlabelled: Leave labels out.
        workers: Processes; None is one per core.
        progress: Called from time to time with images done, images in total, and 0.

    Raises:
        UserError: the recipe or the root is wrong, or no split has an image.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    root = Path(root)
    names = [recipe.split(split)] if split is not None else list(recipe.splits)
    scans, odd, refused = {}, [], []
    for name in names:
        try:
            scans[name] = scan(
                recipe, root, name, include=include, exclude=exclude, unlabelled=unlabelled, need_labels=False
            )
        except UserError as error:
            refused.append(error)
    if not scans:
        raise refused[0]
    # A split that was not downloaded is none of the others' business.
    odd += [str(error) for error in refused]
    jobs, places = [], []
    for name, found in scans.items():
        classes = recipe.class_table(root, required=found.samples[0].label is not None)
        for start in range(0, len(found.samples), _SAMPLES_PER_JOB):
            part = found.samples[start : start + _SAMPLES_PER_JOB]
            jobs.append(_Job(root, part, recipe.coding, classes, recipe.values))
            places.append(name)
    total = sum(len(found.samples) for found in scans.values())
    results = run_jobs(_examine, jobs, total=total, workers=workers, progress=progress)
    facts: dict[str, list[_Facts]] = {name: [] for name in scans}
    for name, result in zip(places, results, strict=True):
        facts[name] += result
    splits, problems = [], []
    for name, found in scans.items():
        classes = recipe.class_table(root, required=found.samples[0].label is not None)
        summary = _summary(name, found.samples, found.passed_over, facts[name], recipe.coding, classes)
        splits.append(summary)
        for sample, fact in zip(found.samples, facts[name], strict=True):
            if fact.problem:
                problems.append(Problem(name, sample.image, fact.problem.replace(f"{root}/", "")))
        if summary.labelled and classes and len(summary.empty_classes) == len(classes):
            problems.append(Problem(name, "", "no label has a pixel of any class"))
        odd += _odd(summary)
    odd += _near_duplicates({name: found.samples for name, found in scans.items()}, facts)
    return Check(str(root), recipe.name, splits, problems, odd)


def _examine(job: _Job, report: Report) -> list[_Facts]:
    table = label_table(job.coding, job.classes) if job.samples[0].label is not None else {}
    facts = []
    for raw in job.samples:
        try:
            facts.append(_facts(job, raw, table))
        except UserError as error:
            facts.append(_Facts(problem=str(error)))
        report(1, 0)
    return facts


def _facts(job: _Job, raw: RawSample, table: Table) -> _Facts:
    header = open_header(job.root / raw.image)
    kind = f"{header.format} {header.mode}"
    codes: dict[int | str, int] = {}
    image, _ = read_pair(job.root, RawSample(raw.key, raw.image, None), job.coding, table, values=job.values)
    extremes = np.asarray(image)
    problem = ""
    try:
        if raw.label is not None:
            codes = count_values(job.root, raw, job.coding, image.size)
            read_pair(job.root, raw, job.coding, table, values=job.values)
    except UserError as error:
        problem = str(error)
    return _Facts(
        problem=problem,
        kind=kind,
        orientation=orientation(header),
        size=image.size,
        extremes=(int(extremes.min()), int(extremes.max())),
        digest=_hash(image),
        codes=codes,
    )


def _hash(image: Image.Image) -> bytes:
    """Hash of 256 bits, each of which says whether one part of an image is brighter than the next; empty if flat."""
    small = image.convert("L").resize((_HASH_EDGE + 1, _HASH_EDGE), Image.Resampling.BOX)
    bits = np.diff(np.asarray(small, np.int16), axis=1) > 0
    return np.packbits(bits).tobytes() if _FEWEST_EDGES <= bits.sum() <= bits.size - _FEWEST_EDGES else b""


def _summary(
    name: str,
    samples: Sequence[RawSample],
    passed_over: str,
    facts: Sequence[_Facts],
    coding: Coding,
    classes: tuple[ClassInfo, ...],
) -> SplitCheck:
    sizes = Counter(fact.size for fact in facts if fact.size is not None)
    read = [fact for fact in facts if fact.size is not None]
    labelled = samples[0].label is not None
    pixels, images = Counter[int | str](), Counter[int | str]()
    for fact in facts:
        pixels.update(fact.codes)
        images.update(fact.codes.keys())
    table = label_table(coding, classes) if labelled else {}
    values, covered = [], set[int]()
    for value, count in pixels.most_common():
        train_id = table.get(str(value), len(classes)) if isinstance(table, dict) else int(table[int(value)])
        covered.add(train_id)
        known = classes[train_id].name if train_id < len(classes) else "not in the coding"
        meaning = "ignore" if train_id == IGNORE_INDEX else known
        values.append(LabelValue(shown_code(value, coding), meaning, count / pixels.total(), images[value]))
    empty = [info.name for index, info in enumerate(classes) if index not in covered] if labelled else []
    return SplitCheck(
        name=name,
        images=len(samples),
        labelled=labelled,
        passed_over=passed_over,
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


def _odd(found: SplitCheck) -> list[str]:
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
        alike: dict[int, int] = {}
        for start in range(0, len(hashes[1]), _HASHES_AT_ONCE):
            # Of vectors of -1 and 1, the product counts equal bits minus different ones.
            products = hashes[1][start : start + _HASHES_AT_ONCE] @ hashes[0].T
            for row, column in np.argwhere(products >= _HASH_EDGE**2 - 2 * _NEAR_BITS):
                alike.setdefault(start + int(row), int(column))
        # Splits that are made of the same files, such as one by night and all of them, are meant to overlap.
        alike = {row: column for row, column in alike.items() if names[1][row] != names[0][column]}
        if alike:
            row, column = next(iter(alike.items()))
            lines.append(
                f"splits {first} and {second}: {len(alike):,} images of {second} look like one of {first}, such as "
                f"{names[1][row]} and {names[0][column]}"
            )
    return lines
