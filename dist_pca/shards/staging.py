"""The staging folder, in which shards are written until all of them are complete, and their publication.

The name of a staged shard contains a digest of everything that its bytes depend on. So the name alone distinguishes
shards of different builds, and a process left over from an earlier build cannot overwrite those of this one.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dist_pca.classes import ClassInfo
from dist_pca.errors import UserError
from dist_pca.files import read_record, write_json, write_whole
from dist_pca.shards.bands import NPY
from dist_pca.shards.build_lock import locked
from dist_pca.shards.manifest import MANIFEST_NAME, Manifest, describe_empty_classes, load_manifest, save_manifest
from dist_pca.shards.plan import OnError, Plan
from dist_pca.shards.writer import Skipped, Written, read_written

STAGING = ".building"
SKIPPED_NAME = "skipped.json"
_DONE = ".built"
_OUTLINE = "plan.json"
_SHARDS = "shard-*.tar"
_REMEDY = "wait until it ends and run this command again, or choose another --out"


@dataclass(frozen=True)
class Outline:
    """The part of a plan that is needed to join its finished shards without the raw files."""

    fingerprint: str
    recipe: str
    recipe_version: int
    split: str
    labelled: bool
    classes: tuple[ClassInfo, ...]
    shards: tuple[str, ...]
    """Name of each staged tar."""
    samples: int
    on_error: OnError
    tasks: int
    bands: int = 3

    def part(self, task: int) -> slice:
        """Shards that a task writes."""
        count = len(self.shards)
        return slice(task * count // self.tasks, (task + 1) * count // self.tasks)


_OUTLINES = TypeAdapter(Outline)
_REPORTS = TypeAdapter(tuple[Skipped, ...])


def outline(plan: Plan, tasks: int) -> Outline:
    """Outline of a plan, as stored in its staging folder."""
    return Outline(
        fingerprint=plan.fingerprint,
        recipe=plan.recipe.name,
        recipe_version=plan.recipe.version,
        split=plan.split,
        labelled=plan.labelled,
        classes=plan.classes,
        shards=tuple(f"shard-{index:06d}-{digest[:16]}.tar" for index, digest in enumerate(plan.shard_digests)),
        samples=len(plan.samples),
        on_error=plan.on_error,
        tasks=tasks,
        bands=plan.recipe.reading.count,
    )


def shard_name(staged: str) -> str:
    """Final name of a staged shard."""
    return f"{staged.rpartition('-')[0]}.tar"


def sweep(out: Path) -> None:
    """Remove the leftovers of a build that was killed after it was published."""
    shutil.rmtree(out / _DONE, ignore_errors=True)


def is_built(out: Path, fingerprint: str) -> bool:
    """Whether a folder already holds this build.

    Raises:
        UserError: the folder holds other shards.
    """
    if (out / MANIFEST_NAME).exists():
        if load_manifest(out).fingerprint == fingerprint:
            return True
        raise UserError(f"shards {out}: holds another build; choose another --out, or replace it with --force")
    if any(out.glob(_SHARDS)):
        raise UserError(f"shards {out}: holds shards without a manifest; choose another --out, or replace with --force")
    return False


@contextmanager
def whole_folder(out: Path, fingerprint: str | None = None) -> Iterator[Path]:
    """Create and lock the staging folder; first finish an earlier build that was killed while it was published.

    `fingerprint` is that of the plan to build, for the message about another build.

    Raises:
        UserError: another build is running there.
    """
    with ExitStack() as held:
        staging = _hold(held, out, fcntl.LOCK_EX, fingerprint)
        if (staging / MANIFEST_NAME).exists():
            _put_in_place(out)
            staging = _hold(held, out, fcntl.LOCK_EX, fingerprint)
        yield staging


@contextmanager
def task_folder(out: Path, wanted: Outline, task: int) -> Iterator[Path]:
    """Create the staging folder and lock one task's part of it; other tasks of the same plan lock theirs.

    Raises:
        UserError: a whole build, this task, or tasks of another plan are running there.
    """
    with ExitStack() as held:
        staging = _hold(held, out, fcntl.LOCK_SH)
        if (staging / MANIFEST_NAME).exists():
            raise UserError(f"shards {out}: a build was killed at its end; finish it with `dist-pca shards merge`")
        with locked(staging / "plan.lock", fcntl.LOCK_EX):
            if read_outline(staging) != wanted:
                others = "tasks with another recipe, other options, other raw files or another --tasks are running"
                for path in staging.glob("task-*.lock"):
                    with locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB, f"shards {out}: {others} there; {_REMEDY}"):
                        pass
                write_outline(staging, wanted)
            busy = f"shards {out}: another process is running --task {task} there; {_REMEDY}"
            held.enter_context(locked(staging / f"task-{task}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB, busy))
        yield staging


def _hold(held: ExitStack, out: Path, kind: int, fingerprint: str | None = None) -> Path:
    staging = out / STAGING
    busy = f"shards {out}: another build is writing there; {_REMEDY}"
    running = read_outline(staging)
    if fingerprint is not None and running is not None and running.fingerprint != fingerprint:
        others = "another build is writing there, of another recipe, options or raw files"
        busy = f"shards {out}: {others}; choose another --out"
    while True:
        out.mkdir(parents=True, exist_ok=True)
        # A build that ends at this moment removes its folder, and the lock with it.
        with suppress(FileNotFoundError):
            staging.mkdir(exist_ok=True)
            lock = staging / "lock"
            handle = held.enter_context(locked(lock, kind | fcntl.LOCK_NB, busy))
            if os.path.samestat(lock.stat(), os.fstat(handle)):
                return staging


def read_outline(staging: Path) -> Outline | None:
    """The plan whose shards are staged; None if there is none."""
    try:
        return _OUTLINES.validate_json((staging / _OUTLINE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_outline(staging: Path, wanted: Outline) -> None:
    """Record the plan whose shards are staged."""
    write_whole(staging / _OUTLINE, _OUTLINES.dump_json(wanted).decode())


def finished(staging: Path, plan: Outline, name: str) -> Written | None:
    """Description of a staged shard, if it is finished and the plan would write the same bytes."""
    written = read_written(staging / name)
    return None if written is None or (written.skipped and plan.on_error == "fail") else written


def clear(staging: Path, *, keep: Iterable[str], beginnings: tuple[str, ...]) -> None:
    """Remove partial files and other plans' shards whose names start with `beginnings`; `keep` lists staged tars."""
    kept = {kept for name in keep for kept in (name, f"{Path(name).stem}.json")}
    for path in staging.iterdir():
        if path.name.removeprefix(".").startswith(beginnings) and path.name not in kept:
            path.unlink(missing_ok=True)


def publish(out: Path, plan: Outline) -> Manifest:
    """Move the finished shards of a plan to their final names, and the manifest last.

    Raises:
        UserError: a shard is missing, more than half of the samples were skipped, or no label has a pixel of a class.
    """
    staging = out / STAGING
    written = {name: finished(staging, plan, name) for name in plan.shards}
    _check_complete(out, plan, {name for name, found in written.items() if found is None})
    found = [description for description in written.values() if description is not None]
    skipped = tuple(sample for description in found for sample in description.skipped)
    if 2 * len(skipped) > plan.samples:
        raise UserError(
            f"shards {out}: {len(skipped)} of {plan.samples} samples were skipped, more than half, the first "
            f"{skipped[0].image}: {skipped[0].reason}; check that the recipe fits the data set"
        )
    shards = tuple(description.shard for description in found if description.shard.keys)
    manifest = Manifest(
        folder=staging,
        recipe=plan.recipe,
        recipe_version=plan.recipe_version,
        split=plan.split,
        labelled=plan.labelled,
        classes=plan.classes,
        shards=shards,
        fingerprint=plan.fingerprint,
        image_member=None if plan.bands == 3 else NPY,
        bands=plan.bands,
    )
    describe_empty_classes(replace(manifest, folder=out))
    if skipped:
        write_json(staging / SKIPPED_NAME, [asdict(sample) for sample in skipped])
    # From here on the build is committed: if this process is killed, the next one finishes the move.
    save_manifest(manifest)
    _put_in_place(out)
    return replace(manifest, folder=out)


def read_skipped(out: Path) -> tuple[Skipped, ...]:
    """Samples that were skipped when a shard folder was built.

    Raises:
        UserError: their list is damaged.
    """
    path = out / SKIPPED_NAME
    return read_record(path, _REPORTS, "remove it") if path.is_file() else ()


def _check_complete(out: Path, plan: Outline, missing: set[str]) -> None:
    lacking = {task: len(missing.intersection(plan.shards[plan.part(task)])) for task in range(plan.tasks)}
    parts = [f"--task {task} ({count} shard{'s' if count > 1 else ''})" for task, count in lacking.items() if count]
    if parts:
        raise UserError(
            f"shards {out}: {len(parts)} of {plan.tasks} parts are not finished: {', '.join(parts)}; run "
            f"`dist-pca shards build` with --tasks {plan.tasks} and each of them, all other options unchanged"
        )


def _put_in_place(out: Path) -> None:
    """Move the shards that a staged manifest lists; after a kill at any point, another call completes the move."""
    staging = out / STAGING
    manifest = load_manifest(staging, check_files=False)
    plan = read_outline(staging)
    places = {shard_name(name): staging / name for name in plan.shards} if plan else {}
    # A folder without a manifest counts as not built, so the manifest is removed first and written last.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for stale in set(out.glob(_SHARDS)) - {out / shard.name for shard in manifest.shards}:
        stale.unlink()
    for shard in manifest.shards:
        if places[shard.name].exists():
            places[shard.name].replace(out / shard.name)
    (out / SKIPPED_NAME).unlink(missing_ok=True)
    if (staging / SKIPPED_NAME).exists():
        write_whole(out / SKIPPED_NAME, (staging / SKIPPED_NAME).read_text(encoding="utf-8"), staging)
    save_manifest(replace(manifest, folder=out), staging)
    sweep(out)
    # Renamed before it is removed, so that its remains after a kill are never mistaken for a build.
    staging.replace(out / _DONE)
    sweep(out)
