"""Tiles of the similarity matrix, and the kernels of the blockwise online softmax made of them; plain PyTorch.

The whole matrix never exists. A tile is a block of queries against a block of keys, small enough to stay in the cache.
Its matmul may be in bf16; accumulation is in fp32, or fp64 for fp64 inputs.
"""

from typing import NamedTuple, Protocol

import torch

CPU_TILE_BYTES, GPU_TILE_BYTES = 8 << 20, 256 << 20
"""Memory of one tile [bytes]. Larger ones leave a CPU's cache, and every pass over them waits for memory."""
ROW_MULTIPLE = 32
"""Rows of a tile are a multiple of this."""
MIN_ROWS = 256
"""Least rows of a tile, whatever its memory: with fewer, matmuls wait for the keys, which every tile reads again."""
MAX_GROUP = 64
"""Columns whose maximum is taken first: PyTorch's maximum is vectorised on CPUs, its argmax is not."""
_MIXED_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether PyTorch multiplies bf16 to fp32 on GPUs; older versions round the result to bf16."""
# On processors to which MKL gives no AVX-512, oneDNN multiplies twice as fast; PyTorch uses it only for bf16.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


def row_blocks(rows: int, columns: int, device: torch.device, element_size: int = 4) -> list[slice]:
    """Split rows into blocks whose tiles fit the memory budget.

    Args:
        rows: Number of rows to split.
        columns: Columns of a tile.
        device: Where tiles are computed.
        element_size: Memory of one logit [bytes].
    """
    budget = CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    height = max(MIN_ROWS, budget // max(1, element_size * columns) // ROW_MULTIPLE * ROW_MULTIPLE)
    return [slice(start, start + height) for start in range(0, rows, height)]


def logits_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Compute `query @ key.T` [n, m] in fp32 or fp64."""
    return upcast(matmul(query, key.T))


def upcast(tile: torch.Tensor) -> torch.Tensor:
    """Convert to fp32; fp32 and fp64 tensors are returned as they are."""
    return tile.to(torch.promote_types(tile.dtype, torch.float32))


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute `left @ right`; bf16 accumulates in fp32, and the result is fp32 on GPUs and rounded to bf16 on CPUs."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return matmul_in_fp32(left, right)
    if _ONEDNN and left.device.type == "cpu" and left.dtype == torch.float32 and left.numel() and right.numel():
        if not (right.is_contiguous() or right.T.is_contiguous()):
            # With a slice of columns oneDNN takes a thousand times as long.
            right = right.contiguous()
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
        return result
    return left @ right


def matmul_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute `left @ right` in fp32, from bf16 operands on a GPU without a copy of them in fp32 where PyTorch can."""
    if left.is_cuda and left.dtype == torch.bfloat16 and _MIXED_PRODUCTS:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def row_maximum(tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the largest value of each row and its column, the lowest where several tie, of [n, m]."""
    columns = tile.shape[1]
    if tile.is_cuda or columns < 4 * MAX_GROUP:
        value, index = tile.max(dim=1)
        return value, index
    # Maximum of each group of columns; the last group overlaps the one before if columns are not a multiple.
    full = columns // MAX_GROUP * MAX_GROUP
    maxima = torch.unflatten(tile[:, :full], 1, (-1, MAX_GROUP)).amax(dim=2)
    if full < columns:
        maxima = torch.cat([maxima, tile[:, -MAX_GROUP:].amax(dim=1, keepdim=True)], dim=1)
    # First group with the maximum, and first column of the maximum within it.
    first = (maxima.argmax(dim=1) * MAX_GROUP).clamp(max=columns - MAX_GROUP)
    group = tile.gather(1, first[:, None] + torch.arange(MAX_GROUP, device=tile.device))
    within = group.argmax(dim=1, keepdim=True)
    return group.gather(1, within)[:, 0], first + within[:, 0]


def backward_matmuls(
    probabilities: torch.Tensor, key: torch.Tensor, weighted: torch.Tensor, key_gradient: torch.Tensor | None
) -> torch.Tensor:
    """Compute dq = `P @ key` [n, C] of a tile P [n, m], and add dk = `P.T @ weighted` to `key_gradient`.

    Args:
        probabilities: [n, m], P.
        key: [m, C].
        weighted: [n, C], queries scaled by weight and temperature.
        key_gradient: [m, C], on CPUs faster if it is transposed in memory; None where keys have no gradient.
    """
    probabilities = probabilities.to(key.dtype)
    if key_gradient is None:
        return upcast(matmul(probabilities, key))
    if key.is_cuda and key.dtype != torch.bfloat16:
        key_gradient.addmm_(probabilities.T, weighted)
    elif key.is_cuda:
        key_gradient += matmul(probabilities.T, weighted)
    else:
        # dk' = weighted' P: transposing the tile instead would copy all of it.
        key_gradient.T.add_(matmul(weighted.T.contiguous(), probabilities))
    return upcast(matmul(probabilities, key))


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
