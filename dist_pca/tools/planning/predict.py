"""A prediction: one run on one cluster."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from dist_pca.config import Level, RunConfig
from dist_pca.data.source import micro_batch_size
from dist_pca.errors import UserError
from dist_pca.tools.planning import association, lovasz
from dist_pca.tools.planning.association import Candidates
from dist_pca.tools.planning.hardware import Assumptions, Cluster
from dist_pca.tools.planning.memory import Memory, memory
from dist_pca.tools.planning.network import NetworkStep
from dist_pca.tools.planning.timing import Timing, communication_seconds, timing
from dist_pca.tools.planning.traffic import Traffic, traffic


@dataclass(frozen=True)
class Prediction:
    """What a run takes on a cluster. Memory and bytes are of one GPU, time and operations of one update."""

    config: RunConfig
    cluster: Cluster
    stage: int
    images: tuple[int, int]
    """Source and target images in one rank's micro-batch."""
    steps: int
    communication: dict[str, str]
    """How each level of the association sends its keys."""
    memory: Memory
    usable: float
    """Bytes of the GPU's memory that tensors can have."""
    traffic: list[Traffic]
    communication_seconds: list[float]
    """Seconds of each kind of traffic, without overlap."""
    network_flops: float
    """Network operations of one update on one GPU."""
    association_flops: float
    timing: Timing

    @property
    def fits(self) -> bool:
        """The peak is within what tensors can have."""
        return self.memory.peak <= self.usable

    @property
    def hours(self) -> float:
        """Hours for all steps, without starts, checkpoints and validation."""
        return self.steps * self.timing.step / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours on all GPUs together."""
        return self.hours * self.cluster.size

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, operations, hours."""
        images = self.cluster.size * self.config.training.accumulation * sum(self.images)
        return {
            "gpus": self.cluster.size,
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.per_node,
            "gpu": self.cluster.gpu.name,
            "zero_stage": self.stage,
            "scope": self.config.objective.association.scope,
            "communication": self.communication,
            "lovasz_scope": self.config.objective.lovasz.scope,
            "lovasz_bins": self.config.objective.lovasz.bins,
            "images_per_gpu": {"source": self.images[0], "target": self.images[1]},
            "images_per_update": images,
            "memory_bytes": {
                **{part: round(count) for part, count in self.memory.parts.items()},
                "peak": round(self.memory.peak),
                "usable": round(self.usable),
                "most": {part: round(count) for part, count in self.memory.most.items()},
                "phases": {phase: round(count) for phase, count in self.memory.phases.items()},
            },
            "peak_phase": self.memory.phase,
            "fits": self.fits,
            "sent_bytes": {part.kind: round(part.bytes) for part in self.traffic},
            "flops": {"network": round(self.network_flops), "association": round(self.association_flops)},
            "seconds": {
                "network_compute": self.timing.network_compute,
                "association_compute": self.timing.association_compute,
                "communication": {
                    part.kind: seconds for part, seconds in zip(self.traffic, self.communication_seconds, strict=True)
                },
                "exposed_communication": self.timing.exposed_communication,
                "loader": self.timing.loader,
                "step": self.timing.step,
            },
            "bound": self.timing.bound,
            "images_per_second": images / self.timing.step,
            "steps": self.steps,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
        }


def images_per_rank(config: RunConfig, ranks: int) -> tuple[int, int]:
    """Source and target images in one rank's micro-batch.

    Raises:
        UserError: a batch cannot be divided evenly; the message gives the overrides that fix it.
    """
    accumulation = config.training.accumulation
    try:
        source, *target = (
            micro_batch_size(batch, world_size=ranks, accumulation=accumulation, key=key)
            for key, batch in config.batches.items()
        )
    except UserError as error:
        parts = ranks * accumulation
        fitting = (f"{key}={ceil(batch / parts) * parts}" for key, batch in config.batches.items())
        raise UserError(f"{error}, for example {' '.join(fitting)}") from None
    return source, target[0] if target else 0


def predict(
    config: RunConfig,
    network: NetworkStep,
    cluster: Cluster,
    assumptions: Assumptions,
    *,
    images: tuple[int, int],
    stage: int,
    steps: int,
) -> Prediction:
    """Predict a run whose micro-batch has been through `run_network`.

    Args:
        config: The run.
        network: The step of its network with these images.
        cluster: GPUs.
        assumptions: What they reach.
        images: Source and target images in one rank's micro-batch.
        stage: ZeRO stage.
        steps: Updates.
    """
    device, ranks = cluster.gpu.name, cluster.size
    settings = config.objective.association
    candidates_by_level = dict(find_candidates(config, network, cluster, images))
    terms = {
        f"association {level}": association.memory(settings, level, candidates, device)
        for level, candidates in candidates_by_level.items()
    }
    if config.objective.lovasz.weight > 0:
        height, width = config.data.crop
        term = config.objective.lovasz
        together = lovasz.ranks_together(term, cluster)
        terms["lovasz"] = lovasz.memory(images[0] * height * width, network.logits[0], together, term.bins, device)
    sent = traffic(config, network, candidates_by_level, cluster, stage=stage, source_images=images[0])
    flops = sum(
        association.flops(settings, candidates, assumptions, device) for candidates in candidates_by_level.values()
    )
    micro_batches = config.training.accumulation
    return Prediction(
        config=config,
        cluster=cluster,
        stage=stage,
        images=images,
        steps=steps,
        communication={
            level: association.communication(settings, candidates) for level, candidates in candidates_by_level.items()
        },
        memory=memory(config, network, terms, stage=stage, ranks=ranks, device=device),
        usable=cluster.gpu.memory * (1 - assumptions.reserve) / cluster.ranks_per_device,
        traffic=sent,
        communication_seconds=[communication_seconds(part, cluster, assumptions) for part in sent],
        network_flops=micro_batches * (network.convolution_flops + network.product_flops),
        association_flops=micro_batches * flops,
        timing=timing(config, network, sent, flops, cluster, assumptions, images),
    )


def sweep(
    config: RunConfig,
    network: NetworkStep,
    cluster: Cluster,
    assumptions: Assumptions,
    *,
    images: tuple[int, int],
    stage: int,
    largest: int,
) -> list[Prediction]:
    """Predict 1, 2, 4, ... GPUs of a node and 1, 2, 4, ... full nodes, up to `largest` GPUs.

    Images per GPU are constant: the batch grows with the GPUs, and steps shrink so that as many images are seen.
    """
    powers = [2**power for power in range(largest.bit_length())]
    sizes = [size for size in powers if size < cluster.per_node]
    sizes += [cluster.per_node * nodes for nodes in powers]
    clusters = [
        Cluster(cluster.gpu, ceil(size / cluster.per_node), min(size, cluster.per_node))
        for size in sizes
        if size <= largest
    ]
    return [
        predict(
            config,
            network,
            other,
            assumptions,
            images=images,
            stage=stage,
            steps=ceil(config.training.steps * cluster.size / other.size),
        )
        for other in clusters
    ]


def find_candidates(
    config: RunConfig, network: NetworkStep, cluster: Cluster, images: tuple[int, int]
) -> Iterator[tuple[Level, Candidates]]:
    """The association's candidate set of each level; none where the run does not adapt."""
    settings = config.objective.association
    if not config.objective.adapt or settings.weight == 0:
        return
    ranks = {"pair": 1, "rank": 1, "node": cluster.per_node, "world": cluster.size}[settings.scope]
    for level in settings.levels:
        # Both levels are associated on the features' grid.
        channels, height, width = network.features
        pixels = min(height * width, settings.pixel_budget or height * width)
        source, target = (count * pixels for count in images)
        sets = images[0] if settings.scope == "pair" else 1
        classes = network.logits[0]
        yield level, Candidates(source, target, channels if level == "features" else classes, classes, ranks, sets)
