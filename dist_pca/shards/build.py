"""Building a shard folder: every byte of it a function of the recipe, the options and the raw files."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
    """What one task of several has finished; the whole folder where that is built already."""

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
    """Turn a raw data set into a shard folder. The same raw files give the same bytes on any number of workers.

    Shards are written aside, in `out/.building`, and renamed when all are whole; the manifest comes last. A build
    that fails, is interrupted or killed leaves what was in `out` before, and beside it the shards that it finished:
    the next build takes those that it would write again.

    Args:
        recipe: A recipe, or a shipped one's name, or the path of a YAML file.
        root: Folder of the raw data set.
        out: Folder for the shards. If it already holds this very build, nothing is done.
        workers: Processes that write shards, one shard each; None is one per core. 1 works in this process.
        force: Replace whatever shards `out` holds.
        progress: Called now and then with samples done, samples to do in all, and bytes stored so far.
        options: As of `make_plan`.

    Raises:
        UserError: anything the caller can put right: missing or damaged raw files, labels that do not fit, an `out`
            that holds something else or that another build is writing to, a full disk.
    """
    plan, out = make_plan(recipe, root, **options), Path(out)
    stage.sweep(out)
    if not force and not _cut_short(out) and stage.is_built(out, plan.fingerprint):
        return load_manifest(out)
    with _made(out), stage.whole_folder(out) as staging:
        try:
            if not force and stage.is_built(out, plan.fingerprint):  # now that what was cut short is finished
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
    """Build one of several parts of a shard folder; `merge_parts` puts them together when all are there.

    Parts may be built at once, on machines that share `out`. Together they are the shards of one build, and a part
    that is finished is not built again.

    Args:
        recipe: As of `build_shards`, and so on.
        root: Folder of the raw data set.
        out: Folder for the shards.
        task: Which part, 0 or more and below `tasks`.
        tasks: Number of parts.
        workers: Processes that write shards.
        force: Let `merge_parts` replace whatever shards `out` holds.
        progress: As of `build_shards`.
        options: As of `make_plan`; the same for every part.

    Raises:
        UserError: as of `build_shards`.
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
    """Put the parts that `build_part` built together, to the very bytes of one build.

    Raises:
        UserError: there are no parts, or not all of them (those missing are named), or a task is still at work.
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
    """Write what is not finished of some of a plan's shards; their descriptions."""
    names = outline.shards[part]
    found = {name: stage.finished(staging, outline, name) for name in names}
    done = [name for name, written in found.items() if written is not None]
    # Shards of other plans go, but only of this part: other tasks may be at work on theirs.
    beginnings = tuple(f"{stage.shard_name(name).removesuffix('.tar')}-" for name in names)
    stage.clear(staging, keep=done, beginnings=("shard-",) if len(names) == len(outline.shards) else beginnings)
    jobs = [
        ShardJob(
            path=staging / name,
            name=stage.shard_name(name),
            root=plan.root,
            samples=plan.samples[samples],
            coding=plan.recipe.coding,
            classes=plan.classes,
            encoding=plan.encoding,
            on_error=plan.on_error,
        )
        for name, samples in zip(names, plan.shards[part], strict=True)
        if name not in done
    ]
    total = sum(len(job.samples) for job in jobs)
    try:
        run_jobs(write_shard, jobs, total=total, workers=workers, progress=progress)
    except (OSError, UserError) as error:
        whole = [name for name in names if stage.finished(staging, outline, name) is not None]
        stage.clear(staging, keep=whole, beginnings=beginnings)
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"shards {staging.parent}: build stopped: {error}; mend that and build again"
        counted = f"finished shards are kept ({len(whole)} of {len(names)}), building again goes on from there"
        kept = f"; {counted}" if whole else ""
        raise UserError(f"{reason}{kept}") from error
    return [written for name in names if (written := stage.finished(staging, outline, name)) is not None]


def _cut_short(out: Path) -> bool:
    return (out / stage.STAGING / MANIFEST_NAME).exists()


@contextmanager
def _made(out: Path) -> Iterator[None]:
    """Take away again, after an error, the folders that were made for `out` and are empty."""
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except BaseException as error:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"shards {out}: build stopped: {error}; mend that and build again") from error
        raise
