"""Fused GPU kernels in Triton: match and backward pass of queries over keys, without the [n, m] matrix in memory.

This module can be imported without Triton; `triton_kernels` has the device code.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dist_pca.association.tiles import BlockMatch, matmul_in_fp32

KERNEL_ROWS = 1 << 16
"""Queries of one call: as many scaled copies are made."""
FUSED_CHANNELS = {torch.bfloat16: 256, torch.float32: 64}
"""Most channels for which a backward kernel accumulates in registers; beyond, it goes through scratch and torch.mm."""
ATOMIC_CHANNELS = 32
"""Most channels for which one kernel with atomics replaces one kernel for each gradient. An atomic sum moves
4 * C / 128 bytes for each probability; a second pass costs two matmuls and an exponential."""
SCRATCH_BYTES = 32 << 20
"""Memory of one tile of probabilities of wide rows [bytes]: it should stay in the L2 cache between two matmuls."""
SCRATCH_MULTIPLE = 64
"""Sides of those tiles are multiples of this: rows that start on 16 bytes are loaded and multiplied faster."""
MATCH_WAVES, BACKWARD_WAVES = 4, 2
"""Programs wanted for each multiprocessor. Each program of a backward kernel writes a sum [rows, C], so it wants
fewer."""
MAX_ROWS = 128
"""Rows of the largest stationary block; chunks of the streaming operand are multiples of it."""


def can_run(device: torch.device) -> bool:
    """Check that Triton is installed, and the device is an NVIDIA GPU from Ampere on or the interpreter is enabled."""
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True)
class TritonKernels:
    """Fused kernels of the blockwise online softmax; logits and results accumulate in fp32."""

    deterministic: bool = False
    """Give the same sums, bit by bit, in every process on the same kind of GPU: no atomics, and block sizes that are
    fixed rather than timed."""

    def row_blocks(self, rows: int, columns: int, device: torch.device) -> list[slice]:
        """Split query rows into blocks of `KERNEL_ROWS`."""
        return [slice(start, start + KERNEL_ROWS) for start in range(0, rows, KERNEL_ROWS)]

    def match(self, query: torch.Tensor, key: torch.Tensor, *, logsumexp: bool) -> BlockMatch:
        """Find each query's best key, and the log-sum-exp of its logits if asked for.

        Args:
            query: [n, C], fp32 or bf16; n may be 0.
            key: [m, C], of the same type; m is 1 or more.
            logsumexp: Compute the log-sum-exp too.
        """
        from dist_pca.association import triton_kernels  # Triton may be missing where this file is imported.

        n, m = len(query), len(key)
        query, key = _aligned(query), _aligned(key)
        chunk, chunks = _chunks(n, m, query.device, MATCH_WAVES)
        # One row of results for each chunk of keys.
        logit = query.new_empty((chunks, n), dtype=torch.float32)
        index = torch.empty_like(logit, dtype=torch.int64)
        sums = torch.empty_like(logit) if logsumexp else logit
        if n > 0:
            _launch(
                triton_kernels.match_kernel,
                lambda meta: (_ceil_div(n, meta["ROWS"]), chunks),
                n * m,
                fixed=self.deterministic,
                query=query,
                key=key,
                logit=logit,
                index=index,
                logsumexp=sums,
                n=n,
                m=m,
                chunk=chunk,
                LOGSUMEXP=logsumexp,
            )
        # The first of several maxima, so ties between chunks of keys go to the lowest index as well.
        maximum, best_chunk = logit.max(dim=0)
        best = index.gather(0, best_chunk[None])[0]
        return BlockMatch(maximum, best, sums.logsumexp(dim=0) if logsumexp else None)

    def backward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        weighted: torch.Tensor,
        logsumexp: torch.Tensor,
        key_gradient: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute `P @ key` [n, C] in fp32, and add `P.T @ weighted` to `key_gradient`.

        With `P = exp(query @ key.T - logsumexp[:, None])`, rounded to the input's type for the matmuls.

        Args:
            query: [n, C], fp32 or bf16; n may be 0.
            key: [m, C], of the same type; m is 1 or more.
            weighted: [n, C], of the same type.
            logsumexp: fp32 [n].
            key_gradient: fp32 [m, C], changed in place; None where keys have no gradient.
        """
        n, channels = query.shape
        if n == 0:
            return query.new_zeros((0, channels), dtype=torch.float32)
        fixed = self.deterministic
        query, key, weighted = _aligned(query), _aligned(key), _aligned(weighted)
        if channels > FUSED_CHANNELS[query.dtype]:
            query_sum = _backward_wide(query, key, weighted, logsumexp, key_gradient, fixed=fixed)
        elif key_gradient is None or fixed or channels > ATOMIC_CHANNELS:
            query_sum = _backward_one_side(query, key, key, logsumexp, keys_stationary=False, fixed=fixed)
            if key_gradient is not None:
                key_sum = _backward_one_side(key, query, weighted, logsumexp, keys_stationary=True, fixed=fixed)
                key_gradient += key_sum[:, :channels]
        else:
            query_sum, key_sum = _backward_atomic(query, key, weighted, logsumexp)
            key_gradient += key_sum[:, :channels]
        return query_sum[:, :channels].contiguous()


def _backward_one_side(
    stationary: torch.Tensor,
    streaming: torch.Tensor,
    values: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    keys_stationary: bool,
    fixed: bool,
) -> torch.Tensor:
    """Compute `P @ values` with stationary queries, or `P.T @ values` with stationary keys, without atomics."""
    from dist_pca.association import triton_kernels

    chunk, chunks = _chunks(len(stationary), len(streaming), stationary.device, BACKWARD_WAVES)
    parts = stationary.new_empty((chunks, *stationary.shape), dtype=torch.float32)
    _launch(
        triton_kernels.backward_kernel,
        lambda meta: (_ceil_div(len(stationary), meta["ROWS"]), chunks),
        len(stationary) * len(streaming),
        fixed=fixed,
        stationary=stationary,
        streaming=streaming,
        values=values,
        logsumexp=logsumexp,
        stationary_sum=parts,
        streaming_sum=parts,
        n_stationary=len(stationary),
        n_streaming=len(streaming),
        chunk=chunk,
        KEYS_STATIONARY=keys_stationary,
        ATOMIC=False,
    )
    return parts.sum(dim=0)


def _backward_atomic(
    query: torch.Tensor, key: torch.Tensor, weighted: torch.Tensor, logsumexp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `P @ key` and `P.T @ weighted` in one pass, added up in the order in which programs happen to end."""
    from dist_pca.association import triton_kernels

    chunk, chunks = _chunks(len(key), len(query), key.device, BACKWARD_WAVES)
    query_sum = torch.zeros_like(query, dtype=torch.float32)
    key_sum = torch.zeros_like(key, dtype=torch.float32)
    _launch(
        triton_kernels.backward_kernel,
        lambda meta: (_ceil_div(len(key), meta["ROWS"]), chunks),
        len(query) * len(key),
        fixed=False,
        stationary=key,
        streaming=query,
        values=weighted,
        logsumexp=logsumexp,
        stationary_sum=key_sum,
        streaming_sum=query_sum,
        n_stationary=len(key),
        n_streaming=len(query),
        chunk=chunk,
        KEYS_STATIONARY=True,
        ATOMIC=True,
    )
    return query_sum, key_sum


def _backward_wide(
    query: torch.Tensor,
    key: torch.Tensor,
    weighted: torch.Tensor,
    logsumexp: torch.Tensor,
    key_gradient: torch.Tensor | None,
    *,
    fixed: bool,
) -> torch.Tensor:
    """Compute `P @ key`, and add `P.T @ weighted` to `key_gradient`, one tile of P at a time in scratch memory."""
    n, m = len(query), len(key)
    elements = SCRATCH_BYTES // query.element_size()
    # About square, so that the matmuls read and write the least for each probability.
    columns = _part_length(m, math.isqrt(elements), SCRATCH_MULTIPLE)
    rows = _part_length(n, max(1, elements // columns), SCRATCH_MULTIPLE)
    scratch = query.new_empty((rows, columns))
    query_sum = torch.zeros_like(query, dtype=torch.float32)
    for keys in _slices(m, columns):
        for queries in _slices(n, rows):
            probability = scratch[: queries.stop - queries.start, : keys.stop - keys.start]
            _probabilities(query[queries], key[keys], logsumexp[queries], probability, fixed=fixed)
            # P K.
            query_sum[queries] += matmul_in_fp32(probability, key[keys])
            if key_gradient is not None:
                # dk += P' (w / sigma * Q).
                key_gradient[keys] += matmul_in_fp32(probability.T, weighted[queries])[:, : key_gradient.shape[1]]
    return query_sum


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, logsumexp: torch.Tensor, result: torch.Tensor, *, fixed: bool
) -> None:
    """Write `exp(query @ key.T - logsumexp)` to `result` [n, m], whose rows need not be contiguous."""
    from dist_pca.association import triton_kernels

    n, m = result.shape
    _launch(
        triton_kernels.probability_kernel,
        lambda meta: (_ceil_div(n, meta["ROWS"]), _ceil_div(m, meta["COLUMNS"])),
        n * m,
        fixed=fixed,
        query=query,
        key=key,
        logsumexp=logsumexp,
        probability=result,
        n=n,
        m=m,
        stride=result.stride(0),
    )


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Pad channels with zeros to a multiple of 16, so that each row starts where vectors can be loaded."""
    return F.pad(x, (0, -x.shape[1] % 16)) if x.shape[1] % 16 else x.contiguous()


def _chunks(stationary: int, streaming: int, device: torch.device, waves: int) -> tuple[int, int]:
    """Choose the streaming rows of one program, and the programs of a stationary block, to occupy the whole GPU."""
    wanted = max(1, waves * _multiprocessors(device) // max(1, _ceil_div(stationary, MAX_ROWS)))
    chunk = _part_length(streaming, max(MAX_ROWS, streaming // wanted), MAX_ROWS)
    return chunk, _ceil_div(streaming, chunk)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _has_large_shared_memory(device: torch.device) -> bool:
    """Check that a program may use 160 KB of shared memory, as on data-centre GPUs."""
    properties: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 160 << 10


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _part_length(length: int, limit: int, multiple: int) -> int:
    """Divide a length into equal parts of about `limit` at most, and round theirs up to a multiple."""
    return _ceil_div(_ceil_div(length, _ceil_div(length, limit)), multiple) * multiple


def _slices(length: int, part: int) -> list[slice]:
    return [slice(start, min(start + part, length)) for start in range(0, length, part)]


def _launch(
    kernel: Any, grid: Callable[[dict[str, int]], tuple[int, int]], work: int, *, fixed: bool, **arguments: Any
) -> None:
    """Launch a kernel with the fastest block sizes, or with `fixed` ones that are not timed.

    Args:
        kernel: One of `triton_kernels`.
        grid: Programs by block sizes.
        work: Number of logits; block sizes are tuned anew for each magnitude.
        fixed: Take fixed block sizes.
        arguments: Arguments of the kernel; the first is a matrix of the type and width to tune for.
    """
    from dist_pca.association import triton_kernels

    rows = next(iter(arguments.values()))
    bf16, channels = rows.dtype == torch.bfloat16, rows.shape[1]
    with torch.cuda.device(rows.get_device()):
        if fixed or triton_kernels.INTERPRETED.value:
            shapes = triton_kernels.shapes(kernel, bf16, channels)
            shape = shapes[0] if _has_large_shared_memory(rows.device) else shapes[-1]
            kernel[grid](**arguments, C=channels, **shape.all_kwargs())
        else:
            variant = tuple(value for value in arguments.values() if isinstance(value, bool))
            tuned = triton_kernels.tuned(kernel, variant, bf16, channels, work.bit_length() // 4)
            tuned[grid](**arguments, C=channels)
