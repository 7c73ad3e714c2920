"""Bytes that one rank sends to others in one update of the weights, by kind, and how they travel."""

from math import ceil
from typing import Literal, NamedTuple

from dist_pca.config import Level, RunConfig
from dist_pca.tools.planning import association, lovasz
from dist_pca.tools.planning.association import Candidates
from dist_pca.tools.planning.hardware import Cluster
from dist_pca.tools.planning.memory import group_elements, travelling_bytes
from dist_pca.tools.planning.network import NetworkStep
from dist_pca.tools.planning.term import all_gather, all_reduce, reduce_scatter
from dist_pca.training.deepspeed_config import PERSISTENT_ELEMENTS

Pattern = Literal["ring", "neighbour"]


class Traffic(NamedTuple):
    """One kind of communication."""

    kind: str
    bytes: float
    calls: int
    """Collectives, each of which takes a while however little it carries."""
    pattern: Pattern
    """`ring`: all adapters of a node share the load. `neighbour`: a rank sends to the next one through its own."""
    nodes: bool
    """It crosses from node to node, where there are several."""
    overlaps: bool
    """Whether the traffic overlaps with the backward pass."""


def traffic(
    config: RunConfig,
    network: NetworkStep,
    candidates_by_level: dict[Level, Candidates],
    cluster: Cluster,
    *,
    stage: int,
    source_images: int,
) -> list[Traffic]:
    """All kinds of communication of one update; none on a single rank.

    Args:
        config: The run.
        network: Its network's step.
        candidates_by_level: The association's candidate set of each level.
        cluster: GPUs; on a processor DeepSpeed does not overlap.
        stage: ZeRO stage.
        source_images: Source images in one rank's micro-batch.
    """
    ranks, device = cluster.size, cluster.gpu.name
    if ranks == 1:
        return []
    micro_batches = config.training.accumulation
    found = _weights_and_gradients(config, network, stage, ranks, device)
    if config.objective.uses_teacher:
        sent, calls = _teacher(config, network, stage, ranks)
        found.append(Traffic("teacher", micro_batches * sent, micro_batches * calls, "ring", True, False))
    if config.model.batch_norm == "sync" and network.batch_norms:
        passes = micro_batches * network.passes
        sizes, calls = _batch_norms(network, ranks)
        found.append(Traffic("batch norm", passes * sizes, passes * calls, "ring", True, False))
    term = config.objective.lovasz
    together = lovasz.ranks_together(term, cluster)
    if term.weight > 0 and together > 1:
        height, width = config.data.crop
        sent = lovasz.sent_bytes(source_images * height * width, network.logits[0], together, term.bins)
        calls = micro_batches * (5 if term.bins is None else 1)
        found.append(Traffic("lovasz", micro_batches * sent, calls, "ring", term.scope == "world", False))
    for level, candidates in candidates_by_level.items():
        settings = config.objective.association
        sent = association.sent_bytes(settings, candidates, device)
        ring = association.communication(settings, candidates) == "ring"
        calls = 10 if not ring else 10 + 5 * (candidates.ranks - 1)
        if candidates.ranks > 1:
            found.append(
                Traffic(
                    f"association {level}",
                    micro_batches * sent,
                    micro_batches * calls,
                    "neighbour" if ring else "ring",
                    settings.scope == "world",
                    False,
                )
            )
    return found


def _weights_and_gradients(
    config: RunConfig, network: NetworkStep, stage: int, ranks: int, device: str
) -> list[Traffic]:
    overlaps = device != "cpu"
    micro_batches = config.training.accumulation
    parameters = [parameter for group in network.groups for parameter in group]
    gradients = sum(parameter.elements * travelling_bytes(config, parameter) for parameter in parameters)
    if stage == 3:
        # What is gathered for forward is still there in backward: networks are smaller than DeepSpeed's limit of 10^9
        # elements that it keeps. A teacher's passes break the order in which it expects modules, and it then lets go of
        # each after use. Small parameters are sent to all once an update.
        forward, calls = _shared_out(config, network, ranks)
        gathers = micro_batches * (2 * network.passes if config.objective.uses_teacher else 1)
        weights = gathers * forward + _persistent(network, ranks)
        reduced = reduce_scatter(gradients, ranks)
        return [
            Traffic("weights", weights, gathers * calls + 1, "ring", True, False),
            Traffic("gradients", micro_batches * reduced, micro_batches, "ring", True, overlaps),
        ]
    # Stage 1 waits for the last micro-batch; stage 2 sends each one's. Either way whole buckets are all-reduced.
    reductions = micro_batches if stage == 2 else 1
    return [
        Traffic("gradients", reductions * all_reduce(gradients, ranks), reductions, "ring", True, overlaps),
        Traffic("weights", _groups(network, ranks), len(network.groups), "ring", True, False),
    ]


def _teacher(config: RunConfig, network: NetworkStep, stage: int, ranks: int) -> tuple[float, int]:
    """Bytes and collectives that make a micro-batch's network the teacher and the student again."""
    if stage < 3:
        return _groups(network, ranks), len(network.groups)
    forward, calls = _shared_out(config, network, ranks)
    # It sees the source too where it chooses matches.
    passes = 1 + config.objective.shows_source_to_teacher
    return passes * forward + 2 * _persistent(network, ranks), passes * calls + 2


def _groups(network: NetworkStep, ranks: int) -> float:
    """Bytes for gathering the whole network in fp32 on all ranks, group by group."""
    own = sum(2 * ceil(count / (2 * ranks)) for count in group_elements(network))
    return all_gather(4 * own, ranks)


def _shared_out(config: RunConfig, network: NetworkStep, ranks: int) -> tuple[float, int]:
    """Bytes and number of collectives for gathering the parameters that stage 3 partitions, for a forward pass."""
    shared = [p for group in network.groups for p in group if p.elements >= PERSISTENT_ELEMENTS]
    sizes = (all_gather(travelling_bytes(config, p) * ceil(p.elements / ranks), ranks) for p in shared)
    return sum(sizes), len(shared)


def _persistent(network: NetworkStep, ranks: int) -> float:
    """Bytes for updating the small parameters, which stage 3 does not partition, on all ranks."""
    elements = sum(p.elements for group in network.groups for p in group if p.elements < PERSISTENT_ELEMENTS)
    return all_gather(4 * ceil(elements / ranks), ranks)


def _batch_norms(network: NetworkStep, ranks: int) -> tuple[float, int]:
    """Bytes and collectives of one forward and backward pass."""
    # Forward: sums, sums of squares and the count in fp64. Backward: two sums of gradients in fp32.
    sizes = (all_reduce(8 * (2 * channels + 1) + 4 * 2 * channels, ranks) for channels in network.batch_norms)
    return sum(sizes), 2 * len(network.batch_norms)
