"""Bytes of tensors that are alive on one GPU at the fullest moment of a training step."""

from dataclasses import dataclass
from math import ceil

from dist_pca.config import RunConfig
from dist_pca.tools.planning.network import NetworkStep, Parameter
from dist_pca.tools.planning.term import Term
from dist_pca.training.deepspeed_config import BUCKET_ELEMENTS


@dataclass(frozen=True)
class Memory:
    """Bytes that are alive, by part and by phase of the step.

    Parts are `weights` (fp32 parameters as this rank holds them, beside them the teacher's in the phase `teacher`, and
    buffers), `gradients` (what this rank keeps of them, and the buckets they travel in), `optimizer` (its own fp32 copy
    of this rank's share of the weights, its moments, and running averages), `activations` (and their gradients, and
    images), `lovasz` and `association`.
    """

    phase: str
    """The fullest phase."""
    parts: dict[str, float]
    """What each part takes in the fullest phase."""
    most: dict[str, float]
    """What each part takes when it takes most."""
    phases: dict[str, float]
    """All parts together at the fullest moment of each phase."""

    @property
    def peak(self) -> float:
        """Peak memory in bytes, as measured by `torch.cuda.max_memory_allocated`."""
        return self.phases[self.phase]


def memory(
    config: RunConfig, network: NetworkStep, terms: dict[str, Term], *, stage: int, ranks: int, device: str
) -> Memory:
    """Memory of one rank.

    Args:
        config: The run.
        network: Its network's step.
        terms: What `lovasz` and each level of the association add to the phases of that name.
        stage: ZeRO stage.
        ranks: Number of ranks.
        device: A GPU's name, or `cpu`, where collectives do not overlap with the computation.
    """
    # Flat groups are padded so that they can be divided evenly.
    padded = sum(2 * ranks * ceil(count / (2 * ranks)) for count in group_elements(network))
    own = padded / ranks
    offload = config.training.offload
    states = 1 + (2 if config.optimizer.name == "adamw" else int(config.optimizer.momentum > 0))
    states += int(config.training.ema_decay > 0)
    optimizer = 0.0 if offload.moves_optimizer else 4 * own * states
    kept, buckets = _gradients(config, network, stage, ranks, device)
    # Under stage 3 what is gathered in forward stays until backward, beside this rank's share.
    shared_out = network.parameters + (0.0 if offload.moves_parameters else own)
    weights = 4 * (padded if stage < 3 else shared_out) + network.frozen_bytes + network.buffer_bytes

    saved: dict[str, float] = {}
    moments: dict[str, dict[str, float]] = {}
    for phase, alive in network.phases:
        name = phase.removesuffix(" backward")
        held = dict(saved)
        if name in terms and phase == name:
            held[name], saved[name] = terms[name].forward, terms[name].saved
        elif name in terms:
            held[name] = terms[name].backward
            del saved[name]
        moments[phase] = {
            # Up to stage 2 the teacher's weights are gathered beside the student's; stage 3 exchanges the two.
            "weights": weights + (4 * padded if phase == "teacher" and stage < 3 else 0),
            "gradients": kept + (buckets if _has_buckets(config, stage, phase) else 0),
            "optimizer": optimizer,
            "activations": float(alive),
            "lovasz": held.get("lovasz", 0.0),
            "association": sum(size for key, size in held.items() if key.startswith("association")),
        }
    phases = {phase: sum(parts.values()) for phase, parts in moments.items()}
    fullest = max(phases, key=phases.__getitem__)
    most = {part: max(parts[part] for parts in moments.values()) for part in moments[fullest]}
    return Memory(fullest, moments[fullest], most, phases)


def _gradients(config: RunConfig, network: NetworkStep, stage: int, ranks: int, device: str) -> tuple[float, float]:
    """Bytes of gradients that are kept through a step, and of the buckets that they travel in."""
    parameters, offloaded = network.parameters, config.training.offload.moves_optimizer
    # There are buckets for each type in which gradients travel.
    types = {travelling_bytes(config, parameter) for group in network.groups for parameter in group}
    if stage == 3:
        return (0.0 if offloaded else 4 * parameters / ranks), float(sum(types) * BUCKET_ELEMENTS)
    # Two take turns where they are sent while the next is filled; all are fp32 whatever they are sent in.
    buckets = (1 if device == "cpu" else 2) * len(types) * 4.0 * BUCKET_ELEMENTS
    if config.training.accumulation == 1 or offloaded:
        return 0.0, buckets
    return 4 * parameters * (1 if stage == 1 else 1 / ranks), buckets


def _has_buckets(config: RunConfig, stage: int, phase: str) -> bool:
    """Stage 3 always has its buckets, stage 1 from the first backward pass of an update to the last."""
    return phase == "gradients" or stage == 3 or (stage == 1 and config.training.accumulation > 1)


def group_elements(network: NetworkStep) -> list[int]:
    """Elements of each parameter group."""
    return [sum(parameter.elements for parameter in group) for group in network.groups]


def travelling_bytes(config: RunConfig, parameter: Parameter) -> int:
    """Bytes of an element of its gradient on its way to other ranks."""
    return 2 if parameter.low and config.training.precision != "fp32" else 4
