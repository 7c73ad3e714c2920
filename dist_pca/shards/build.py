"""Building a shard folder: every byte of it a function of the recipe, the options and the raw files."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_pca.errors import UserError
from dist_pca.shards.classes import ClassInfo
from dist_pca.shards.images import Encoding, ImageFormat
from dist_pca.shards.manifest import MANIFEST_NAME, Manifest, load_manifest, save_manifest
from dist_pca.shards.pool import run_jobs
from dist_pca.shards.recipe import Recipe, load_recipe
from dist_pca.shards.scan import RawSample, scan
from dist_pca.shards.writer import ShardJob

BUILDER_VERSION = 1
"""Part of every fingerprint; raise it when the same raw files and options would become other bytes."""

_STAGING = ".building"
_SHARDS = "shard-*.tar"


@dataclass(frozen=True)
class _Plan:
    """What a build is made of, settled before anything is written."""

    recipe: Recipe
    root: Path
    split: str
    samples: list[RawSample]
    classes: tuple[ClassInfo, ...]
    encoding: Encoding
    samples_per_shard: int

    @property
    def labelled(self) -> bool:
        return self.samples[0].label is not None

    def fingerprint(self) -> str:
        """Digest of the recipe, the options and the names and sizes of the raw files."""
        digest = hashlib.sha256()
        options = {
            "builder": BUILDER_VERSION,
            "recipe": self.recipe.model_dump(mode="json", exclude={"description"}),
            "classes": [asdict(info) for info in self.classes],
            "split": self.split,
            "encoding": asdict(self.encoding),
            "samples_per_shard": self.samples_per_shard,
        }
        digest.update(json.dumps(options, sort_keys=True).encode())
        for sample in self.samples:
            for name in (sample.image, sample.label):
                size = None if name is None else (self.root / name).stat().st_size
                digest.update(json.dumps([name, size]).encode())
        return digest.hexdigest()

    def jobs(self, folder: Path) -> list[ShardJob]:
        """One job per shard, in the order of the samples."""
        return [
            ShardJob(
                path=folder / f"shard-{index:06d}.tar",
                root=self.root,
                samples=tuple(self.samples[start : start + self.samples_per_shard]),
                coding=self.recipe.coding,
                classes=self.classes,
                encoding=self.encoding,
            )
            for index, start in enumerate(range(0, len(self.samples), self.samples_per_shard))
        ]


def build_shards(
    recipe: Recipe | str | Path,
    root: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unlabelled: bool = False,
    image_format: ImageFormat = "keep",
    quality: int = 90,
    max_edge: int | None = None,
    samples_per_shard: int = 256,
    force: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> Manifest:
    """Turn a raw data set into a shard folder. The same raw files give the same bytes on any number of workers.

    Shards are written aside, in `out/.building`, and renamed when all are whole; the manifest comes last. A build
    that fails or is interrupted leaves what was in `out` before.

    Args:
        recipe: A recipe, or a shipped one's name, or the path of a YAML file.
        root: Folder of the raw data set.
        out: Folder for the shards. If it already holds this very build, nothing is done.
        split: One of the recipe's splits; None where it has only one.
        workers: Processes that write shards, one shard each; None is one per core. 1 works in this process.
        include: Globs on image paths relative to `root` (`*` spans folders); only matching images are taken.
        exclude: Globs likewise; matching images are left out.
        unlabelled: Leave labels out though the data set has them.
        image_format: `keep` stores JPEG, PNG and WebP files byte for byte and others as PNG.
        quality: Quality of images that are encoded as JPEG or WebP, 1 to 100.
        max_edge: Images with a longer edge (pixels) are shrunk to it, labels by nearest neighbour.
        samples_per_shard: Samples in each shard but the last.
        force: Replace whatever shards `out` holds.
        progress: Called now and then with samples done, samples in all, and bytes stored so far.

    Raises:
        UserError: anything the caller can put right: missing or damaged raw files, labels that do not fit, an `out`
            that holds something else or that another build is writing to, a full disk.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    root, out = Path(root), Path(out)
    split = recipe.split(split)
    samples = scan(recipe, root, split, include=include, exclude=exclude, unlabelled=unlabelled)
    classes = recipe.class_table(root, required=samples[0].label is not None)
    encoding = Encoding(image_format, quality, max_edge)
    plan = _Plan(recipe, root, split, samples, classes, encoding, samples_per_shard)
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            return _build(plan, out, workers or os.cpu_count() or 1, force, progress)
    except BaseException as error:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"shards {out}: build stopped: {error}; mend that and build again") from error
        raise


def _build(
    plan: _Plan, out: Path, workers: int, force: bool, progress: Callable[[int, int, int], None] | None
) -> Manifest:
    fingerprint = plan.fingerprint()
    if not force and _is_built(out, fingerprint):
        return load_manifest(out)
    staging = out / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        shards = run_jobs(plan.jobs(staging), workers, progress)
        recipe = plan.recipe
        manifest = Manifest(
            out, recipe.name, recipe.version, plan.split, plan.labelled, plan.classes, tuple(shards), fingerprint
        )
        _publish(staging, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other builds; the system lets go of it however this process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(
            f"shards {folder}: another build is writing there; wait for it or choose another --out"
        ) from None
    finally:
        os.close(handle)


def _is_built(out: Path, fingerprint: str) -> bool:
    if (out / MANIFEST_NAME).exists():
        if load_manifest(out).fingerprint == fingerprint:
            return True
        raise UserError(f"shards {out}: holds another build; choose another --out, or replace it with --force")
    if any(out.glob(_SHARDS)):
        raise UserError(f"shards {out}: holds shards without a manifest; choose another --out, or replace with --force")
    return False


def _publish(staging: Path, manifest: Manifest) -> None:
    """Put whole shards in place. Without a manifest the folder counts as unbuilt, so that goes first and comes last."""
    out = manifest.folder
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for stale in out.glob(_SHARDS):
        stale.unlink()
    for shard in manifest.shards:
        (staging / shard.name).rename(out / shard.name)
    save_manifest(manifest)
