"""Write a manifest for WebDataset shards that were made by other tools."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from dist_pca.classes import LABEL_SETS, ClassInfo, label_set
from dist_pca.errors import UserError
from dist_pca.files import file_sha256
from dist_pca.shards.facts import image_shape, label_counts
from dist_pca.shards.manifest import MANIFEST_NAME, Manifest, Shard, describe_empty_classes, save_manifest
from dist_pca.shards.pool import Progress, Report, run_jobs
from dist_pca.shards.recipe import Coding, Recipe, Split
from dist_pca.shards.sample import image_member
from dist_pca.shards.walk import SampleSlice, visible_files, walk

T = TypeVar("T")
RECIPE = "index"
"""Recipe name in the manifest of an indexed folder."""

_COMPRESSED = ("*.tar.*", "*.tgz", "*.tbz2", "*.txz", "*.tzst")


@dataclass(frozen=True)
class _Job:
    path: Path
    image_member: str | None
    label_member: str
    classes: int | None


@dataclass(frozen=True)
class _Found:
    """An indexed shard, and its first sample without labels with the members that it has, if there is one."""

    shard: Shard
    bands: int
    lacking: str | None
    members: str


def index_shards(
    folder: str | Path,
    *,
    classes: Sequence[ClassInfo] | None = None,
    image_member: str | None = None,
    label_member: str = "label.png",
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a manifest into a folder of plain WebDataset shards; the shards are only read.

    Args:
        folder: Folder with the shards, `*.tar`.
        classes: Class table by train id; needed if there are labels.
        image_member: Extension of the members that hold images, arrays of height x width x bands if it is `npy`; None
            takes jpg, jpeg, png or webp.
        label_member: Extension of the members that hold labels: 8-bit PNGs of train ids, 255 for ignore.
        force: Replace an existing manifest.
        workers: Processes, one shard each; None is one per core.
        progress: Called from time to time with shards done, shards in total, and bytes done.

    Raises:
        UserError: a shard is not a plain tar of regular files, a sample has no image, only some samples have labels, a
            label does not fit its image or the class table, no label has a pixel of a class, or a key occurs twice.
    """
    folder = Path(folder)
    paths = _shards(folder, force)
    table = None if classes is None else tuple(classes)
    image_member = None if image_member is None else image_member.lower()
    jobs = [_Job(path, image_member, label_member.lower(), None if table is None else len(table)) for path in paths]
    found = run_jobs(_index, jobs, total=len(jobs), workers=workers, progress=progress)
    shards = tuple(entry.shard for entry in found)
    _check_keys(folder, shards)
    labelled = any(shard.pixel_counts for shard in shards)
    for entry in found:
        if entry.bands != found[0].bands:
            raise UserError(
                f"{folder / entry.shard.name}: its images have {entry.bands} bands, those of {shards[0].name} have "
                f"{found[0].bands}; move shards of one number of bands to a folder of their own"
            )
        if labelled and entry.lacking is not None:
            raise UserError(
                f"{folder / entry.shard.name}: sample {entry.lacking!r} has no {label_member} while others have, but "
                f"{entry.members}; "
                "add it, or move samples without labels to a separate folder"
            )
    manifest = Manifest(
        folder=folder,
        recipe=RECIPE,
        recipe_version=1,
        split="all",
        labelled=labelled,
        classes=table or (),
        shards=shards,
        label_member=label_member.lower(),
        image_member=image_member,
        bands=found[0].bands,
    )
    describe_empty_classes(manifest)
    try:
        save_manifest(manifest)
    except OSError as error:
        raise UserError(f"{folder / MANIFEST_NAME}: not written ({error}); fix that and index again") from error
    return manifest


def class_table(classes_file: Path | None, set_name: str | None) -> tuple[ClassInfo, ...] | None:
    """Read classes from a YAML list of {name, color} or from a label set; None if neither is given.

    Raises:
        UserError: both are given, the file is not a class table, or there is no such label set.
    """
    if classes_file is not None and set_name is not None:
        raise UserError("--classes and --label-set both define the class table; give only one of them")
    if set_name is not None:
        if set_name not in LABEL_SETS:
            raise UserError(f"--label-set {set_name}: no such label set; available: {', '.join(LABEL_SETS)}")
        return label_set(set_name)
    if classes_file is None:
        return None
    return Recipe(
        name=RECIPE,
        version=1,
        classes_file=classes_file.name,
        coding=Coding(kind="index"),
        splits={"all": Split(images=("*",))},
    ).class_table(classes_file.parent)


def _shards(folder: Path, force: bool) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"shards {folder}: no such folder; give the folder that holds the .tar files")
    if (folder / MANIFEST_NAME).exists() and not force:
        raise UserError(f"shards {folder}: already has a {MANIFEST_NAME}; replace it with --force")
    for pattern in _COMPRESSED:
        for path in visible_files(folder, pattern):
            raise UserError(f"{path}: compressed, so single samples cannot be read; decompress it to a plain tar")
    paths = visible_files(folder, "*.tar")
    if not paths:
        raise UserError(f"shards {folder}: no .tar in it; give the folder that holds the .tar files")
    return paths


def _index(job: _Job, report: Report) -> _Found:
    slices = walk(job.path)
    if not slices:
        raise UserError(f"{job.path}: contains no sample; remove the file")
    shapes, pixel_counts, lacking, members = [], [], None, ""
    with job.path.open("rb") as file:
        for sample in slices:
            try:
                shape, counts = _look(file, sample, job)
            except ValueError as error:
                raise UserError(f"{job.path}: sample {sample.key!r}: {error}; write the shard again") from None
            shapes.append(shape)
            if shape[2] != shapes[0][2]:
                raise UserError(
                    f"{job.path}: sample {sample.key!r} has {shape[2]} bands, and {slices[0].key!r} has "
                    f"{shapes[0][2]}; move samples of one number of bands to a folder of their own"
                )
            if counts is not None:
                pixel_counts.append(counts)
            elif lacking is None:
                lacking, members = sample.key, ", ".join(sorted(sample.members))
    shard = Shard(
        name=job.path.name,
        bytes=job.path.stat().st_size,
        sha256=file_sha256(job.path),
        keys=[sample.key for sample in slices],
        offsets=[sample.offset for sample in slices],
        lengths=[sample.length for sample in slices],
        heights=[height for height, _, _ in shapes],
        widths=[width for _, width, _ in shapes],
        pixel_counts=pixel_counts,
    )
    report(1, shard.bytes)
    return _Found(shard, shapes[0][2], lacking, members)


def _look(file: BinaryIO, sample: SampleSlice, job: _Job) -> tuple[tuple[int, int, int], list[int] | None]:
    """Image shape (height, width, bands) of a sample, and its pixels per class if it has labels."""
    try:
        extension = image_member(sample.members, job.label_member, job.image_member)
    except ValueError as error:
        where = f"{job.path}: sample {sample.key!r}"
        raise UserError(f"{where}: {error}; name the image's with --image-member, or write the shard again") from None
    shape = _named(extension, lambda: image_shape(_member(file, sample, extension), extension, whole=False))
    if job.label_member not in sample.members:
        return shape, None
    if job.classes is None:
        raise UserError(
            f"{job.path}: sample {sample.key!r} has a {job.label_member}; define its classes with --classes or "
            "--label-set"
        )
    classes, label = job.classes, job.label_member
    height, width, _ = shape
    return shape, _named(label, lambda: label_counts(_member(file, sample, label), (width, height), classes))


def _named(member: str, read: Callable[[], T]) -> T:
    """Read a member, whose errors begin with its name."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{member}: {error}") from error


def _member(file: BinaryIO, sample: SampleSlice, extension: str) -> bytes:
    offset, size = sample.members[extension]
    file.seek(offset)
    return file.read(size)


def _check_keys(folder: Path, shards: Sequence[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for key in shard.keys:
            if key in seen:
                raise UserError(
                    f"{folder / shard.name}: sample {key!r} is in {seen[key]} too, or its members are not adjacent; "
                    "give every sample a unique key"
                )
            seen[key] = shard.name
