"""The two kernels of the blockwise online softmax, and their choice: PyTorch tiles or Triton."""

from typing import NamedTuple, Protocol

import torch

from dist_pca.association.options import Options
from dist_pca.association.tiles import backward_matmuls, logits_of, row_blocks, row_maximum


class BlockMatch(NamedTuple):
    """Match of each of n queries within one block of keys."""

    logit: torch.Tensor
    """[n], largest logit."""
    key_index: torch.Tensor
    """int64 [n], its key within the block; the lowest where several tie."""
    logsumexp: torch.Tensor | None
    """[n], log-sum-exp of the logits; None unless asked for."""


class Kernels(Protocol):
    """Kernels that see one block of queries [n, C] and one block of keys [m, C] at a time.

    Queries are scaled by their temperatures, so that logits are `query @ key.T`. Logits accumulate in fp32, or in fp64
    for fp64 inputs; so do all results.
    """

    def row_blocks(self, rows: int, columns: int, device: torch.device) -> list[slice]:
        """Split query rows into blocks for one call each, given the number of keys in a block."""

    def match(self, query: torch.Tensor, key: torch.Tensor, *, logsumexp: bool) -> BlockMatch:
        """Find each query's best key, and the log-sum-exp of its logits if asked for."""

    def backward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        weighted: torch.Tensor,
        logsumexp: torch.Tensor,
        key_gradient: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute `P @ key` [n, C], and add `P.T @ weighted` to `key_gradient`.

        With `P = exp(query @ key.T - logsumexp[:, None])`.

        Args:
            query: [n, C].
            key: [m, C].
            weighted: [n, C].
            logsumexp: [n], over all candidates.
            key_gradient: [m, C] in fp32 or fp64, changed in place; None where keys have no gradient.
        """


class TorchKernels:
    """Kernels made of PyTorch tiles; they give the same bits on every run."""

    def row_blocks(self, rows: int, columns: int, device: torch.device) -> list[slice]:
        """Split query rows into blocks whose tiles fit the memory budget."""
        return row_blocks(rows, columns, device)

    def match(self, query: torch.Tensor, key: torch.Tensor, *, logsumexp: bool) -> BlockMatch:
        """Find each query's best key, and the log-sum-exp of its logits if asked for."""
        logits = logits_of(query, key)
        maximum, index = row_maximum(logits)
        # log sum_j exp(z_j) = max + log sum_j exp(z_j - max).
        total = maximum + (logits - maximum[:, None]).exp_().sum(dim=1).log_() if logsumexp else None
        return BlockMatch(maximum, index, total)

    def backward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        weighted: torch.Tensor,
        logsumexp: torch.Tensor,
        key_gradient: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute `P @ key` [n, C], and add `P.T @ weighted` to `key_gradient`."""
        probabilities = logits_of(query, key).sub_(logsumexp[:, None]).exp_()
        return backward_matmuls(probabilities, key, weighted, key_gradient)


def select_kernels(options: Options, like: torch.Tensor) -> Kernels:
    """Choose the kernels for `options.implementation` on the device of a tensor.

    Raises:
        ValueError: `triton` cannot run on this device.
    """
    if options.implementation != "triton":
        return TorchKernels()
    from dist_pca.association.triton_launch import TritonKernels, can_run

    if not can_run(like.device):
        raise ValueError(
            f"implementation=triton cannot run on {like.device}: it needs Triton and an NVIDIA GPU from Ampere on"
        )
    return TritonKernels(options.deterministic)
