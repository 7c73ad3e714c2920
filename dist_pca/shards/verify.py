"""Verify a shard folder against its manifest, and list every problem, not only the first."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dist_pca.errors import UserError
from dist_pca.files import file_sha256
from dist_pca.shards.facts import image_shape, label_counts
from dist_pca.shards.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest
from dist_pca.shards.pool import Progress, Report, run_jobs
from dist_pca.shards.sample import image_member, read_sample
from dist_pca.shards.walk import visible_files, walk

_SAMPLES_PER_JOB = 64


@dataclass(frozen=True)
class Problem:
    """One problem in a shard folder."""

    file: str
    """File name in the shard folder."""
    key: str
    """Key of the sample; empty if the problem is about the whole file."""
    problem: str


@dataclass(frozen=True)
class Verification:
    """What was checked, and the problems found."""

    folder: str
    deep: bool
    shards: int
    samples: int
    bytes: int
    problems: list[Problem]


@dataclass(frozen=True)
class _Job:
    """A shard to check as a file, or some of its samples to decode."""

    manifest: Manifest
    """The manifest without its shards."""
    shard: Shard
    decode: bool


def verify(
    folder: str | Path, *, deep: bool = False, workers: int | None = None, progress: Progress | None = None
) -> Verification:
    """Compare a shard folder with its manifest.

    Checks sizes and checksums of the files, unlisted files, and the offset, order and key of every sample.

    Args:
        folder: The shard folder.
        deep: Also decode every image and label: check damage, sizes, label values, and pixels of each class.
        workers: Processes; None is one per core.
        progress: Called from time to time with samples done, samples in total (twice as many if deep), and bytes done.

    Raises:
        UserError: there is no such folder, or it has no manifest.
    """
    folder = Path(folder)
    try:
        manifest = load_manifest(folder, check_files=False)
    except UserError as error:
        if not (folder / MANIFEST_NAME).is_file():
            raise
        problem = Problem(MANIFEST_NAME, "", str(error).removeprefix(f"{folder / MANIFEST_NAME}: "))
        return Verification(str(folder), deep, 0, 0, 0, [problem])
    bare = replace(manifest, shards=())
    jobs = [_Job(bare, shard, decode=False) for shard in manifest.shards]
    if deep:
        there = [shard for shard in manifest.shards if (folder / shard.name).is_file()]
        jobs += [_Job(bare, part, decode=True) for shard in there for part in _parts(shard)]
    total = sum(len(job.shard.keys) for job in jobs)
    found = run_jobs(_verify, jobs, total=total, workers=workers, progress=progress)
    problems = [*_folder_problems(manifest), *(problem for part in found for problem in part)]
    return Verification(
        folder=str(folder),
        deep=deep,
        shards=len(manifest.shards),
        samples=manifest.samples,
        bytes=sum(shard.bytes for shard in manifest.shards),
        problems=sorted(problems, key=lambda problem: problem.file),
    )


def _parts(shard: Shard) -> Iterator[Shard]:
    for start in range(0, len(shard.keys), _SAMPLES_PER_JOB):
        part = slice(start, start + _SAMPLES_PER_JOB)
        columns = ("keys", "offsets", "lengths", "heights", "widths", "pixel_counts")
        yield replace(shard, **{name: getattr(shard, name)[part] for name in columns})


def _folder_problems(manifest: Manifest) -> Iterator[Problem]:
    listed = [shard.name for shard in manifest.shards]
    for path in visible_files(manifest.folder, "*.tar"):
        if path.name not in listed:
            yield Problem(path.name, "", f"not listed in {MANIFEST_NAME}")
    first: dict[str, str] = {}
    for shard in manifest.shards:
        for key in shard.keys:
            if key in first:
                yield Problem(shard.name, key, f"the key is in {first[key]} too")
            first.setdefault(key, shard.name)


def _verify(job: _Job, report: Report) -> list[Problem]:
    return list(_sample_problems(job, report) if job.decode else _file_problems(job, report))


def _file_problems(job: _Job, report: Report) -> Iterator[Problem]:
    shard, path = job.shard, job.manifest.folder / job.shard.name
    if not path.is_file():
        yield Problem(shard.name, "", f"listed in {MANIFEST_NAME} but missing")
    else:
        size = path.stat().st_size
        if size != shard.bytes:
            yield Problem(shard.name, "", f"{size} bytes where {MANIFEST_NAME} lists {shard.bytes}")
        elif file_sha256(path) != shard.sha256:
            yield Problem(shard.name, "", f"SHA-256 differs from {MANIFEST_NAME}")
        yield from _slice_problems(path, shard)
    report(len(shard.keys), shard.bytes)


def _slice_problems(path: Path, shard: Shard) -> Iterator[Problem]:
    try:
        slices = walk(path)
    except UserError as error:
        yield Problem(shard.name, "", str(error).removeprefix(f"{path}: "))
        return
    if len(slices) != len(shard.keys):
        problem = f"{len(slices)} samples where {MANIFEST_NAME} lists {len(shard.keys)}"
        yield Problem(shard.name, "", problem)
    listed = zip(shard.keys, shard.offsets, shard.lengths, strict=True)
    for sample, (key, offset, length) in zip(slices, listed, strict=False):
        if sample.key != key:
            yield Problem(shard.name, key, f"the sample at its index is {sample.key!r}")
        elif (sample.offset, sample.length) != (offset, length):
            expected = f"{MANIFEST_NAME} lists bytes {offset} to {offset + length}"
            yield Problem(
                shard.name, key, f"is at bytes {sample.offset} to {sample.offset + sample.length}, {expected}"
            )


def _sample_problems(job: _Job, report: Report) -> Iterator[Problem]:
    manifest, shard = job.manifest, job.shard
    for index, key in enumerate(shard.keys):
        try:
            members = read_sample(manifest, shard, index)
            image = image_member(members, manifest.label_member, manifest.image_member)
            found = [*_image_problems(manifest, shard, index, image, members[image])]
            if manifest.labelled:
                found += _label_problems(manifest, shard, index, members.get(manifest.label_member))
            yield from (Problem(shard.name, key, text) for text in found)
        except (OSError, ValueError, tarfile.TarError) as error:
            yield Problem(shard.name, key, str(error))
        report(1, 0)


def _image_problems(manifest: Manifest, shard: Shard, index: int, member: str, content: bytes) -> Iterator[str]:
    try:
        height, width, bands = image_shape(content, member, whole=True)
    except ValueError as error:
        yield f"{member}: {error}"
        return
    said = (shard.widths[index], shard.heights[index])
    if (width, height) != said:
        yield f"{member}: {width} x {height} pixels where {MANIFEST_NAME} lists {said[0]} x {said[1]}"
    if bands != manifest.bands:
        yield f"{member}: {bands} bands where {MANIFEST_NAME} lists {manifest.bands}"


def _label_problems(manifest: Manifest, shard: Shard, index: int, label: bytes | None) -> Iterator[str]:
    member = manifest.label_member
    if label is None:
        yield f"no {member}"
        return
    try:
        counts = label_counts(label, (shard.widths[index], shard.heights[index]), len(manifest.classes))
    except ValueError as error:
        yield f"{member}: {error}"
        return
    wrong = [
        info.name
        for info, *both in zip(manifest.classes, counts, shard.pixel_counts[index], strict=True)
        if both[0] != both[1]
    ]
    if wrong:
        yield f"{member}: pixel counts of {', '.join(wrong[:5])} differ from {MANIFEST_NAME}"
