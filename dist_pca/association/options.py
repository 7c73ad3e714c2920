"""Options of the association, equal on all ranks, and its inputs: the pixels of one pool."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from dist_pca.association.similarity import Similarity

Implementation = Literal["auto", "reference", "blockwise", "triton"]
ExchangeChoice = Literal["auto", "gather", "ring", "local"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Options:
    """How cycles are found and weighted, equal on every rank. `associate` documents each field."""

    num_classes: int
    similarity: Similarity = "cosine"
    ignore_index: int = 255
    detach_statistics: bool = True
    class_balanced: bool = False
    guide_keys: bool = False
    exchange: ExchangeChoice = "auto"
    implementation: Implementation = "auto"
    dtype: Precision = "fp32"
    wire_dtype: Precision = "fp32"
    deterministic: bool = False


class Inputs(NamedTuple):
    """Pixels of one pool on this rank; all but the first two without gradient."""

    source: torch.Tensor
    """[n_s, C] features or probabilities."""
    target: torch.Tensor
    """[n_t, C]"""
    labels: torch.Tensor
    """int64 [n_s]"""
    target_labels: torch.Tensor | None = None
    """int64 [n_t], true classes, for diagnosis."""
    target_classes: torch.Tensor | None = None
    """int64 [n_t], a teacher's classes."""
    target_weights: torch.Tensor | None = None
    """[n_t], weights of cycles."""
    guide: tuple[torch.Tensor, torch.Tensor] | None = None
    """[n_s, C'] and [n_t, C'], rows that choose the matches in place of the first two."""
