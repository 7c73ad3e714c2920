"""Crops of both domains as training takes them, and what a run's networks give for them."""

from collections.abc import Sequence
from contextlib import closing
from itertools import islice

import torch

from dist_pca.classes import ClassInfo
from dist_pca.config import DataConfig, RunConfig
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.data.class_table import class_table
from dist_pca.data.collate import Batch
from dist_pca.data.decode import resize_range, resized_size
from dist_pca.data.randomness import Domain as DomainName
from dist_pca.data.stream import stream
from dist_pca.data.views import photometric_view
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, backbone_options
from dist_pca.objective.domains import Domain
from dist_pca.shards.manifest import Manifest

Manifests = tuple[Manifest, ...]


def open_domains(
    data: DataConfig, classes: Sequence[ClassInfo], *, target_labels: bool = True
) -> tuple[Manifests, Manifests]:
    """Open the shards of source and target, known to have the classes of a run.

    Args:
        data: Names the shards.
        classes: The run's.
        target_labels: Refuse a target without labels.

    Raises:
        UserError: shards cannot be read or have no labels, there is no target, or classes differ.
    """
    cache = cache_settings(data.cache)
    sources, targets = (
        tuple(open_manifest(folder, cache) for folder in folders)
        for folders in (data.folders("source"), data.folders("target"))
    )
    if not targets:
        raise UserError("--target: the run has no data.target; name labelled shards of the target")
    for target in targets:
        if target_labels and not target.labelled:
            raise UserError(
                f"--target {target.location}: has no labels, and matches can be judged only where target labels are "
                "known; build these shards with labels, or name others"
            )
    names, own = ([info.name for info in table] for table in (class_table(data, sources, targets), classes))
    if names != own:
        raise UserError(
            f"--source {sources[0].location}: has the classes {', '.join(names)} where the run has {', '.join(own)}; "
            "name shards of the run's classes"
        )
    return sources, targets


def take_batches(
    config: RunConfig, sources: Manifests, targets: Manifests, *, batches: int, images: int, whole: bool
) -> list[tuple[Batch, Batch]]:
    """Take the run's first batches of source and target, labels included, as training takes and crops them.

    Args:
        config: The run.
        sources: Its source shards.
        targets: Its target shards.
        batches: How many.
        images: Images of each domain in a batch.
        whole: Show whole frames instead, at the largest shorter edge of training and not mirrored. Of frames of several
            proportions the part that all have is shown.

    Raises:
        UserError: the crop does not fit, the shards have other bands than the network takes, or a shard cannot be read.
    """
    bands = backbone_options(config.model).bands
    if sources[0].bands != bands:
        raise UserError(
            f"--source {sources[0].location}: images of {sources[0].bands} bands, and the network takes {bands}; name "
            f"shards of {bands} bands"
        )

    def taken(domain: DomainName, manifests: Manifests) -> list[Batch]:
        # Loader processes cost more than a few images do.
        frames = _whole_frames(config.data, manifests, domain) if whole else {}
        data = config.data.model_copy(update={"workers": 0} | frames)
        batches_of = stream(
            data,
            manifests,
            domain,
            seed=config.seed,
            rank=0,
            world_size=1,
            global_batch=images,
            accumulation=1,
            start_step=0,
            targets=targets if domain == "source" else (),
        )
        with closing(batches_of):
            return list(islice(batches_of, batches))

    return list(zip(taken("source", sources), taken("target", targets), strict=True))


def _whole_frames(data: DataConfig, manifests: Manifests, domain: DomainName) -> dict[str, object]:
    edge = resize_range(data, domain)[1]
    sizes = [
        resized_size(size, edge)
        for manifest in manifests
        for shard in manifest.shards
        for size in zip(shard.heights, shard.widths, strict=True)
    ]
    crop = min(height for height, _ in sizes), min(width for _, width in sizes)
    return {"shorter_edge": (edge, edge), "source_shorter_edge": None, "crop": crop, "flip": 0.0}


@torch.no_grad()
def look(
    config: RunConfig,
    student: Segmenter,
    teacher: Segmenter | None,
    batch: Batch,
    domain: DomainName,
    device: torch.device | str,
) -> Domain:
    """Run the networks on one domain's crops, the student on changed colours where training changes them.

    Args:
        config: The run.
        student: In evaluation mode, on `device`.
        teacher: Likewise, of the moving average; None where no cycle depends on it.
        batch: The crops.
        domain: Their domain.
        device: Where the networks run.
    """
    images = batch.images.to(device)
    output = student(photometric_view(images, batch.indices, config.data.photometric, seed=config.seed, domain=domain))
    taught = None if teacher is None else teacher(images)
    return Domain(
        output.logits,
        output.features,
        None if batch.labels is None else batch.labels.to(device),
        teacher_logits=None if taught is None else taught.logits,
        teacher_features=None if taught is None else taught.features,
    )
