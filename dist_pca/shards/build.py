"""Build a shard folder, every byte of which is a function of the recipe, the options and the raw files."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import Unpack

from dist_pca.errors import UserError
from dist_pca.shards import staging as stage
from dist_pca.shards.manifest import MANIFEST_NAME, Manifest, load_manifest
from dist_pca.shards.plan import Plan, PlanOptions, make_plan
from dist_pca.shards.pool import Progress, run_jobs
from dist_pca.shards.recipe import Recipe
from dist_pca.shards.writer import ShardJob, Skipped, Written, write_shard


@dataclass(frozen=True)
class Part:
    """Result of one task of several; describes the whole folder if it is already built."""

    shards: int
    samples: int
    bytes: int
    skipped: tuple[Skipped, ...]


def build_shards(
    recipe: Recipe | str | Path,
    root: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> Manifest:
    """Turn a raw data set into a shard folder; the bytes do not depend on the number of workers.

    Shards are written to a staging folder, `out/.building`, and renamed when all are complete; the manifest is moved
    last. A build that fails, is interrupted or is killed keeps the previous content of `out`, and its finished shards
    stay in the staging folder. The next build reuses those that it would write in the same way.

    Args:
        recipe: A recipe, or a shipped one's name, or the path of a YAML file.
        root: Folder of the raw data set.
        out: Folder for the shards. If it already holds the same build, nothing is done.
        workers: Processes that write shards, one shard each; None is one per core, 1 is this process.
        force: Replace any shards in `out`.
        progress: Called from time to time with samples done, samples in total, and bytes stored so far.
        options: Options of `make_plan`.

    Raises:
        UserError: an error that the caller can fix: missing or damaged raw files, labels that do not fit, an `out`
            that holds something else or that another build is writing to, a full disk.
    """
    plan, out = make_plan(recipe, root, **options), Path(out)
    stage.sweep(out)
    if not force and not _cut_short(out) and stage.is_built(out, plan.fingerprint):
        return load_manifest(out)
    with _made(out), stage.whole_folder(out, plan.fingerprint) as staging:
        try:
            if not force and stage.is_built(out, plan.fingerprint):  # whole_folder may have finished a killed build
                shutil.rmtree(staging, ignore_errors=True)
                return load_manifest(out)
            outline = stage.outline(plan, tasks=1)
            stage.write_outline(staging, outline)
            _write(plan, outline, staging, slice(None), workers, progress)
            return stage.publish(out, outline)
        except BaseException:
            if not any(staging.glob("shard-*.json")):
                shutil.rmtree(staging, ignore_errors=True)
            raise


def build_part(
    recipe: Recipe | str | Path,
    root: str | Path,
    out: str | Path,
    *,
    task: int,
    tasks: int,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> Part:
    """Build one of several parts of a shard folder; `merge_parts` joins them when all are finished.

    Parts may be built at the same time, on machines that share `out`. Together they equal the shards of one build. A
    part that is already finished is not built again.

    Args:
        recipe: A recipe, or a shipped one's name, or the path of a YAML file.
        root: Folder of the raw data set.
        out: Folder for the shards.
        task: Index of the part, from 0 to `tasks` - 1.
        tasks: Number of parts.
        workers: Processes that write shards.
        force: Let `merge_parts` replace any shards in `out`.
        progress: As for `build_shards`.
        options: Options of `make_plan`; the same for every part.

    Raises:
        UserError: as for `build_shards`.
    """
    if not 0 <= task < tasks:
        raise UserError(f"--task {task} --tasks {tasks}: tasks are counted from 0, so give one below {tasks}")
    plan, out = make_plan(recipe, root, **options), Path(out)
    stage.sweep(out)
    if not force and not _cut_short(out) and stage.is_built(out, plan.fingerprint):
        manifest = load_manifest(out)
        return Part(len(manifest.shards), manifest.samples, sum(shard.bytes for shard in manifest.shards), ())
    outline = stage.outline(plan, tasks)
    with _made(out), stage.task_folder(out, outline, task) as staging:
        written = _write(plan, outline, staging, outline.part(task), workers, progress)
    return Part(
        shards=len(written),
        samples=sum(len(found.shard.keys) for found in written),
        bytes=sum(found.shard.bytes for found in written),
        skipped=tuple(sample for found in written for sample in found.skipped),
    )


def merge_parts(out: str | Path) -> Manifest:
    """Join the parts that `build_part` built; the result equals that of one build, byte for byte.

    Raises:
        UserError: there are no parts, some are missing (the message names them), or a task is still running.
    """
    out = Path(out)
    if not out.is_dir():
        raise UserError(f"shards {out}: no such folder; build parts there with `dist-pca shards build --task`")
    stage.sweep(out)
    if not (out / stage.STAGING).exists():
        if (out / MANIFEST_NAME).exists():
            return load_manifest(out)
        raise UserError(f"shards {out}: no parts in it; build them with `dist-pca shards build --task`")
    with _made(out), stage.whole_folder(out) as staging:
        outline = stage.read_outline(staging)
        if outline is None:  # whole_folder has just finished a merge
            shutil.rmtree(staging, ignore_errors=True)
            return load_manifest(out)
        return stage.publish(out, outline)


def _write(
    plan: Plan, outline: stage.Outline, staging: Path, part: slice, workers: int | None, progress: Progress | None
) -> list[Written]:
    """Write those of some of a plan's shards that are not finished, and return the descriptions of all of them."""
    names = outline.shards[part]
    found = {name: stage.finished(staging, outline, name) for name in names}
    done = [name for name, written in found.items() if written is not None]
    # Remove shards of other plans, but only those of this part: other tasks may be writing theirs.
    beginnings = tuple(f"{stage.shard_name(name).removesuffix('.tar')}-" for name in names)
    stage.clear(staging, keep=done, beginnings=("shard-",) if len(names) == len(outline.shards) else beginnings)
    jobs = [
        ShardJob(
            staging / name,
            stage.shard_name(name),
            replace(plan, samples=plan.samples[samples], sizes=plan.sizes[samples]),
        )
        for name, samples in zip(names, plan.shards[part], strict=True)
        if name not in done
    ]
    total = sum(len(job.plan.samples) for job in jobs)
    try:
        run_jobs(write_shard, jobs, total=total, workers=workers, progress=progress)
    except (OSError, UserError) as error:
        whole = [name for name in names if stage.finished(staging, outline, name) is not None]
        stage.clear(staging, keep=whole, beginnings=beginnings)
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"shards {staging.parent}: build stopped: {error}; fix that and build again"
        counted = f"finished shards are kept ({len(whole)} of {len(names)}), building again resumes from there"
        kept = f"; {counted}" if whole else ""
        raise UserError(f"{reason}{kept}") from error
    return [written for name in names if (written := stage.finished(staging, outline, name)) is not None]


def _cut_short(out: Path) -> bool:
    return (out / stage.STAGING / MANIFEST_NAME).exists()


@contextmanager
def _made(out: Path) -> Iterator[None]:
    """Remove, after an error, the empty folders that were created for `out`."""
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except BaseException as error:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"shards {out}: build stopped: {error}; fix that and build again") from error
        raise
