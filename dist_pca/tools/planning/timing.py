"""How long an update takes, and what it waits for."""

from typing import Literal, NamedTuple

from dist_pca.config import RunConfig
from dist_pca.tools.planning.hardware import Assumptions, Cluster
from dist_pca.tools.planning.network import NetworkStep
from dist_pca.tools.planning.traffic import Traffic

Bound = Literal["compute", "network", "loader"]
_BETWEEN_NODES = 3
"""A small collective between nodes takes so many times as long as within one."""


class Timing(NamedTuple):
    """Seconds of one update on one rank."""

    network_compute: float
    """Seconds of computing for the student, and for its teacher if there is one."""
    association_compute: float
    exposed_communication: float
    """Communication that nothing is computed beside."""
    loader: float
    """To read and decode the update's images, beside the computation where there are loader processes."""
    step: float
    bound: Bound


def timing(
    config: RunConfig,
    network: NetworkStep,
    sent: list[Traffic],
    association_flops: float,
    cluster: Cluster,
    assumptions: Assumptions,
    images: tuple[int, int],
) -> Timing:
    """Time of one update.

    Args:
        config: The run.
        network: Its network's step.
        sent: What is sent in an update.
        association_flops: Operations of the association in one micro-batch.
        cluster: GPUs.
        assumptions: What they reach.
        images: Source and target images in one rank's micro-batch.
    """
    gpu, micro_batches = cluster.gpu, config.training.accumulation
    # Ranks on one device take turns.
    turns = micro_batches * cluster.ranks_per_device
    low = config.training.precision != "fp32"
    convolutions = network.convolution_flops / (gpu.bf16 if low else gpu.tf32)
    products = network.product_flops / (gpu.bf16 if low else gpu.fp32)
    network_compute = turns * (convolutions + products) / assumptions.network_efficiency
    rate = gpu.bf16 if config.objective.association.dtype == "bf16" else gpu.fp32
    association_compute = turns * association_flops / (rate * assumptions.association_efficiency)

    seconds = [(part, communication_seconds(part, cluster, assumptions)) for part in sent]
    hidden = sum(time for part, time in seconds if part.overlaps)
    exposed = sum(time for part, time in seconds if not part.overlaps)
    # Gradients are exchanged during the backward pass.
    backward = network.backward_flops / (network.convolution_flops + network.product_flops)
    exposed += max(0.0, hidden - backward * network_compute)

    processes = max(1, config.data.workers)
    # Each domain has loader processes of its own.
    per_domain = [micro_batches * count / (processes * assumptions.loader_rate) for count in images]
    loader = max(per_domain) if config.data.workers else sum(per_domain)
    compute = network_compute + association_compute
    step = max(loader, compute + exposed) if config.data.workers else loader + compute + exposed
    bound: Bound = "network" if exposed > compute else "compute"
    if loader > compute + exposed:
        bound = "loader"
    return Timing(network_compute, association_compute, exposed, loader, step, bound)


def communication_seconds(part: Traffic, cluster: Cluster, assumptions: Assumptions) -> float:
    """Time of one kind of communication, if nothing else is under way."""
    gpu, crosses = cluster.gpu, part.nodes and cluster.nodes > 1
    bandwidth = gpu.link
    if crosses:
        bandwidth = min(gpu.link, gpu.network * (cluster.per_node if part.pattern == "ring" else 1))
    latency = assumptions.latency * (_BETWEEN_NODES if crosses else 1)
    return part.bytes / (bandwidth * assumptions.link_efficiency) + part.calls * latency
