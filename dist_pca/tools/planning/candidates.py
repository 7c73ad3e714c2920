"""What wider candidates cost: a match among all ranks' pixels takes more of every rank the more ranks there are."""

from collections.abc import Iterator
from math import sqrt
from typing import Any, NamedTuple

from dist_pca.config import RunConfig, Scope
from dist_pca.tools.planning.hardware import Assumptions, Cluster
from dist_pca.tools.planning.network import NetworkStep
from dist_pca.tools.planning.predict import find_candidates, predict


class Candidates(NamedTuple):
    """One choice of candidates on one number of GPUs."""

    scope: Scope
    budget: int | None
    """Pixels of each image that are associated, where that is not the config's own number."""
    gpus: int
    pixels: int
    """Candidates of a source pixel."""
    flops: float
    """Operations of the association on one GPU in one update; all GPUs together take `gpus` times as many."""
    seconds: float
    """To compute them."""
    sent_bytes: float
    """Bytes that one GPU sends for them."""


def candidate_costs(
    config: RunConfig, network: NetworkStep, cluster: Cluster, assumptions: Assumptions, *, images: tuple[int, int]
) -> list[Candidates]:
    """Costs of each scope, of scope `world` on half and twice as many nodes, and of a pixel budget that bounds it.

    Under `world`, the operations of a GPU grow in proportion to the number of GPUs, and those of all GPUs with its
    square. The budget is that with which `world` takes no more operations than `node` with all pixels. Empty where
    the run does not associate, or runs on a single GPU.
    """
    if not dict(find_candidates(config, network, cluster, images)) or cluster.size == 1:
        return []
    return list(_costs(config, network, cluster, assumptions, images))


def _costs(
    config: RunConfig, network: NetworkStep, cluster: Cluster, assumptions: Assumptions, images: tuple[int, int]
) -> Iterator[Candidates]:
    settings = config.objective.association
    _, height, width = network.features
    pixels = min(height * width, settings.pixel_budget or height * width)

    def cost(scope: Scope, on: Cluster, budget: int | None = None) -> Candidates:
        update: dict[str, Any] = {"scope": scope, "pixel_budget": budget or settings.pixel_budget}
        objective = config.objective.model_copy(update={"association": settings.model_copy(update=update)})
        variant = config.model_copy(update={"objective": objective})
        found = predict(variant, network, on, assumptions, images=images, stage=2, steps=1)
        candidates = next(candidates for _, candidates in find_candidates(variant, network, on, images))
        images_of_rank = 1 if scope == "pair" else images[1]
        return Candidates(
            scope,
            budget,
            on.size,
            images_of_rank * candidates.ranks * min(budget or pixels, pixels),
            found.association_flops,
            found.timing.association_compute,
            sum(part.bytes for part in found.traffic if part.kind.startswith("association")),
        )

    if settings.scope == "pair":
        yield cost("pair", cluster)
    yield cost("rank", cluster)
    if cluster.nodes == 1:
        yield cost("world", cluster)
        return
    yield cost("node", cluster)
    if cluster.nodes % 2 == 0:
        yield cost("world", Cluster(cluster.gpu, cluster.nodes // 2, cluster.per_node))
    yield cost("world", cluster)
    yield cost("world", Cluster(cluster.gpu, 2 * cluster.nodes, cluster.per_node))
    # Operations are those of pairs of pixels.
    yield cost("world", cluster, max(1, int(pixels / sqrt(cluster.nodes))))
