"""Options of the loss, equal on all ranks, and its inputs on this rank."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch

Similarity = Literal["cosine", "kl"]
Implementation = Literal["auto", "reference", "blockwise", "online_softmax", "triton"]
Communication = Literal["auto", "gather", "ring", "local"]
Precision = Literal["fp32", "bf16"]
ClassWeights = tuple[float, ...] | Literal["kept_share"] | None


@dataclass(frozen=True)
class Options:
    """Options of the loss; `cycle_association` documents each field."""

    num_classes: int
    similarity: Similarity = "cosine"
    ignore_index: int = 255
    detach_statistics: bool = True
    class_balanced: bool = False
    class_weights: ClassWeights = None
    guide_keys: bool = False
    communication: Communication = "auto"
    implementation: Implementation = "auto"
    dtype: Precision = "fp32"
    comm_dtype: Precision = "fp32"
    deterministic: bool = False


class PairKeywords(TypedDict, total=False):
    """Options that `cycle_association_pairs` takes as keyword arguments, `num_classes` apart."""

    similarity: Similarity
    ignore_index: int
    detach_statistics: bool
    class_balanced: bool
    class_weights: ClassWeights
    guide_keys: bool
    implementation: Implementation
    dtype: Precision
    deterministic: bool


class LossKeywords(PairKeywords, total=False):
    """Options that `cycle_association` and `CycleAssociationLoss` take as keyword arguments, `num_classes` apart."""

    communication: Communication
    comm_dtype: Precision


class Inputs(NamedTuple):
    """Pixels of one candidate set on this rank; all but the first two without gradient."""

    source: torch.Tensor
    """[n_s, C] features or probabilities."""
    target: torch.Tensor
    """[n_t, C] features or probabilities."""
    labels: torch.Tensor
    """int64 [n_s], labels of the source pixels."""
    target_labels: torch.Tensor | None = None
    """int64 [n_t], true classes of the target pixels, for diagnostics."""
    target_classes: torch.Tensor | None = None
    """int64 [n_t], a teacher's classes of the target pixels."""
    target_weights: torch.Tensor | None = None
    """[n_t], weights of cycles through the target pixels."""
    guide: tuple[torch.Tensor, torch.Tensor] | None = None
    """[n_s, C'] and [n_t, C'], pixels that choose the matches in place of the first two."""
