"""Cycle association loss as a function and as a module."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dist_pca.association.options import ExchangeChoice, Implementation, Options, Precision, Similarity
from dist_pca.association.result import Association
from dist_pca.association.solve import solve

T = TypeVar("T")


def cycle_association(
    source: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    *,
    similarity: Similarity = "cosine",
    num_classes: int,
    target_labels: torch.Tensor | None = None,
    target_classes: torch.Tensor | None = None,
    target_weights: torch.Tensor | None = None,
    class_balanced: bool = False,
    guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    guide_keys: bool = False,
    group: dist.ProcessGroup | None = None,
    exchange: ExchangeChoice = "auto",
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
    dtype: Precision = "fp32",
    wire_dtype: Precision = "fp32",
    deterministic: bool = False,
) -> Association:
    """Compute the cycle association loss of this rank's source and target pixels (PLCA, section 3.1).

    Matches and softmax denominators run over the pixels of all ranks of the group, or with `exchange="local"` over
    this rank's alone. Either way the mean is over the kept cycles of all ranks of the world, and the gradient that
    DDP or ZeRO averages over ranks is that of one process on the concatenated batch.

    Collective: all ranks of the world must call it, with any number of pixels from 1, and all or none of them with each
    optional input except `target_labels`. All communication happens in this call and none in the backward pass; all
    ranks must scale the loss alike.

    Args:
        source: [n_s, C] features, or class probabilities for `kl`.
        target: [n_t, C] features, or class probabilities for `kl`.
        labels: [n_s] integer labels of the source pixels.
        similarity: `cosine`, or `kl` for the negative Kullback-Leibler divergence from query to key.
        num_classes: Number of classes; labels are below it.
        target_labels: [n_t] integer labels, used for diagnostics only.
        target_classes: [n_t] integer classes predicted by a teacher at the target pixels, `ignore_index` where it is
            unsure. A cycle is then consistent only if the class at its matched target equals the source label too.
        target_weights: [n_t] teacher confidences, 0 or more: the weight of every cycle through each target pixel.
        class_balanced: Average within each class, then over the classes that have a kept cycle of positive weight on
            any rank.
        guide: [n_s, C'] and [n_t, C'] features or probabilities without gradient, such as a teacher's, that choose the
            matches of both directions in place of `source` and `target`.
        guide_keys: Use the guide as the keys of both softmaxes too, so that gradients flow into queries alone, as in
            momentum contrast (MoCo, He et al., CVPR 2020); C' must be C.
        group: Ranks whose pixels are candidates for each other; None is the world.
        exchange: `gather` stores all ranks' keys on every rank; `ring` sends them from rank to rank, so that memory
            does not grow with the ranks; `auto` gathers up to `GATHER_BYTES`; `local` uses this rank's pixels alone.
        ignore_index: Label of pixels that neither start nor end a cycle.
        detach_statistics: Stop the gradient through each row's mean and standard deviation.
        implementation: `reference` (dense; gathers), `blockwise` (PyTorch tiles), `online_softmax` (the same, with
            softmaxes accumulated block by block even where all keys are local), `triton` (fused, on GPUs), or `auto`
            for the fastest available.
        dtype: Type of matmul operands in all but `reference`; accumulation is in fp32, or fp64 for fp64 inputs.
        wire_dtype: Type of keys sent between ranks; with `dtype="bf16"` they are sent in bf16 in any case.
        deterministic: Give the same bits on every run, on a GPU too.

    Raises:
        ValueError: on all ranks together, if on any of them shapes do not fit, values are not finite, weights are
            negative, labels are out of range, there are no pixels, or an optional input is missing; ranks and tensors
            are named. Or `triton` cannot run on this device.
    """
    options = Options(
        num_classes=num_classes,
        similarity=similarity,
        ignore_index=ignore_index,
        detach_statistics=detach_statistics,
        class_balanced=class_balanced,
        guide_keys=guide_keys,
        exchange=exchange,
        implementation=implementation,
        dtype=dtype,
        wire_dtype=wire_dtype,
        deterministic=deterministic,
    )
    tensors = _by_name(source, target, labels, target_labels, target_classes, target_weights, guide)
    return solve({name: None if x is None else [x] for name, x in tensors.items()}, group, options)


def cycle_association_pairs(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    *,
    similarity: Similarity = "cosine",
    num_classes: int,
    target_labels: Sequence[torch.Tensor] | None = None,
    target_classes: Sequence[torch.Tensor] | None = None,
    target_weights: Sequence[torch.Tensor] | None = None,
    class_balanced: bool = False,
    guide: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None,
    guide_keys: bool = False,
    ignore_index: int = 255,
    detach_statistics: bool = True,
    implementation: Implementation = "auto",
    dtype: Precision = "fp32",
    deterministic: bool = False,
) -> Association:
    """Compute the cycle association loss image pair by image pair, as in the paper (PLCA, section 3.1).

    Every tensor argument of `cycle_association` is a list here, with one entry for each pair; the guide is a list of
    source features and one of target features. Matches and softmaxes stay within a pair; the mean is over the kept
    cycles of all pairs and ranks together. Collective over the world; raises what `cycle_association` raises.
    """
    options = Options(
        num_classes=num_classes,
        similarity=similarity,
        ignore_index=ignore_index,
        detach_statistics=detach_statistics,
        class_balanced=class_balanced,
        guide_keys=guide_keys,
        exchange="local",
        implementation=implementation,
        dtype=dtype,
        deterministic=deterministic,
    )
    return solve(
        _by_name(sources, targets, labels, target_labels, target_classes, target_weights, guide), None, options
    )


associate = cycle_association
"""Alias of `cycle_association`."""
associate_pairs = cycle_association_pairs
"""Alias of `cycle_association_pairs`."""


class CycleAssociationLoss(nn.Module):
    """Cycle association loss (PLCA, section 3.1) with its options fixed at construction.

    The module has no parameters and no state. Every option is documented at `cycle_association`.

    Example:
        >>> criterion = CycleAssociationLoss(num_classes=19)
        >>> association = criterion(source, target, labels)  # [n_s, C], [n_t, C], [n_s]
        >>> association.loss.backward()
    """

    def __init__(
        self,
        num_classes: int,
        *,
        similarity: Similarity = "cosine",
        class_balanced: bool = False,
        guide_keys: bool = False,
        group: dist.ProcessGroup | None = None,
        exchange: ExchangeChoice = "auto",
        ignore_index: int = 255,
        detach_statistics: bool = True,
        implementation: Implementation = "auto",
        dtype: Precision = "fp32",
        wire_dtype: Precision = "fp32",
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.options = Options(
            num_classes=num_classes,
            similarity=similarity,
            ignore_index=ignore_index,
            detach_statistics=detach_statistics,
            class_balanced=class_balanced,
            guide_keys=guide_keys,
            exchange=exchange,
            implementation=implementation,
            dtype=dtype,
            wire_dtype=wire_dtype,
            deterministic=deterministic,
        )

    def forward(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        labels: torch.Tensor,
        *,
        target_labels: torch.Tensor | None = None,
        target_classes: torch.Tensor | None = None,
        target_weights: torch.Tensor | None = None,
        guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Association:
        """Compute loss and diagnostics of this rank's pixels. Collective over the world.

        Args:
            source: [n_s, C] features, or class probabilities for `kl`.
            target: [n_t, C] features, or class probabilities for `kl`.
            labels: [n_s] integer labels of the source pixels.
            target_labels: [n_t] integer labels, used for diagnostics only.
            target_classes: [n_t] integer classes predicted by a teacher, `ignore_index` where it is unsure.
            target_weights: [n_t] teacher confidences, 0 or more.
            guide: [n_s, C'] and [n_t, C'] features or probabilities that choose the matches.

        Raises:
            ValueError: as `cycle_association` does.
        """
        tensors = _by_name(source, target, labels, target_labels, target_classes, target_weights, guide)
        return solve({name: None if x is None else [x] for name, x in tensors.items()}, self.group, self.options)

    def extra_repr(self) -> str:
        """Format the options for `print(module)`."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


def _by_name(
    source: T,
    target: T,
    labels: T,
    target_labels: T | None,
    target_classes: T | None,
    target_weights: T | None,
    guide: tuple[T, T] | None,
) -> dict[str, T | None]:
    """Name the inputs as error messages do."""
    return {
        "source": source,
        "target": target,
        "labels": labels,
        "target_labels": target_labels,
        "target_classes": target_classes,
        "target_weights": target_weights,
        "guide source": None if guide is None else guide[0],
        "guide target": None if guide is None else guide[1],
    }
