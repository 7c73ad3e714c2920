"""Fused GPU kernels in Triton: match and sweep of query rows over key rows, without their n x m matrix in memory.

This part needs no Triton to be imported; `triton_programs` holds what runs on the device.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dist_pca.association.blockwise import Match

FUSED_CHANNELS = {torch.bfloat16: 256, torch.float32: 64}
"""Most channels for which a sweep holds its sums in registers. Wider rows go through scratch and torch.mm."""
ATOMIC_CHANNELS = 32
"""Most channels for which one kernel with atomics takes the place of one kernel for each side. An atomic sum moves
4 * C / 128 bytes for each probability; a second pass costs two products and an exponential."""
SCRATCH_BYTES = 32 << 20
"""Memory for one tile of probabilities of wide rows: it should not leave the L2 cache between two products."""
SCRATCH_STEP = 64
"""Sides of those tiles are multiples of this: what starts on 16 bytes is loaded and multiplied faster."""
MATCH_WAVES, SWEEP_WAVES = 4, 2
"""Programs wanted for each processor of the GPU. A sweep's programs each write a sum [rows, C], so it wants fewer."""
ROWS = 128
"""Rows of the largest block that a program owns; spans of streamed rows are multiples of it."""


def can_run(device: torch.device) -> bool:
    """Whether Triton is there and the device is an NVIDIA GPU from Ampere on, or Triton interprets its programs."""
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def match(query: torch.Tensor, key: torch.Tensor, *, log_sum: bool, deterministic: bool = False) -> Match:
    """Each query row's best key row, and the sums over all key rows that temperature and softmax need.

    Products accumulate in fp32.

    Args:
        query: [n, C], fp32 or bf16; n may be 0.
        key: [m, C], likewise; m is 1 or more.
        log_sum: Take the log-sum-exp too.
        deterministic: Block sizes are fixed, not timed, so that sums are added in the same order in every process.
    """
    from dist_pca.association import triton_programs as programs  # Triton may be missing where this file is imported.

    n, m = len(query), len(key)
    query, key = _aligned(query), _aligned(key)
    span, splits = _spans(n, m, query.device, MATCH_WAVES)
    value = query.new_empty((splits, n), dtype=torch.float32)
    index = torch.empty_like(value, dtype=torch.int64)
    squares = torch.empty_like(value)
    sums = torch.empty_like(value) if log_sum else value
    if n > 0:
        _launch(
            programs.match_kernel,
            lambda meta: (_ceil(n, meta["ROWS"]), splits),
            n * m,
            fixed=deterministic,
            query=query,
            key=key,
            value=value,
            index=index,
            squares=squares,
            log_sum=sums,
            n=n,
            m=m,
            span=span,
            LOG_SUM=log_sum,
        )
    # The first of several maxima, so ties between spans of keys go to the lowest index as well.
    best, split = value.max(dim=0)
    return Match(
        best,
        index.gather(0, split[None])[0],
        squares.sum(dim=0),
        sums.logsumexp(dim=0) if log_sum else None,
    )


def sweep(
    query: torch.Tensor,
    key: torch.Tensor,
    weighted: torch.Tensor,
    log_sum: torch.Tensor,
    key_gradient: torch.Tensor | None,
    *,
    deterministic: bool,
) -> torch.Tensor:
    """With `P = exp(query @ key.T - log_sum)`: `P @ key`, fp32 [n, C]; `P.T @ weighted` is added to `key_gradient`.

    P is rounded to the input's type for the products; sums are fp32.

    Args:
        query: [n, C], fp32 or bf16; n may be 0.
        key: [m, C], likewise; m is 1 or more.
        weighted: [n, C] of the same type.
        log_sum: fp32 [n].
        key_gradient: fp32 [m, C], changed in place; None where keys have no gradient.
        deterministic: The same sums, bit by bit, in every process on the same kind of GPU: no atomics, and block sizes
            that are fixed, not timed.
    """
    n, channels = query.shape
    if n == 0:
        return query.new_zeros((0, channels), dtype=torch.float32)
    query, key, weighted = _aligned(query), _aligned(key), _aligned(weighted)
    if channels > FUSED_CHANNELS[query.dtype]:
        query_sum = _sweep_wide(query, key, weighted, log_sum, key_gradient, fixed=deterministic)
    elif key_gradient is None or deterministic or channels > ATOMIC_CHANNELS:
        query_sum = _sweep_side(query, key, key, log_sum, owns_keys=False, fixed=deterministic)
        if key_gradient is not None:
            key_sum = _sweep_side(key, query, weighted, log_sum, owns_keys=True, fixed=deterministic)
            key_gradient += key_sum[:, :channels]
    else:
        query_sum, key_sum = _sweep_atomic(query, key, weighted, log_sum)
        key_gradient += key_sum[:, :channels]
    return query_sum[:, :channels].contiguous()


def _sweep_side(
    owned: torch.Tensor,
    streamed: torch.Tensor,
    summed: torch.Tensor,
    log_sum: torch.Tensor,
    *,
    owns_keys: bool,
    fixed: bool,
) -> torch.Tensor:
    """Sum over streamed rows of their probability with each owned row times the rows of `summed`, without atomics."""
    from dist_pca.association import triton_programs as programs

    span, splits = _spans(len(owned), len(streamed), owned.device, SWEEP_WAVES)
    parts = owned.new_empty((splits, *owned.shape), dtype=torch.float32)
    _launch(
        programs.sweep_kernel,
        lambda meta: (_ceil(len(owned), meta["ROWS"]), splits),
        len(owned) * len(streamed),
        fixed=fixed,
        owned=owned,
        streamed=streamed,
        weighted=summed,
        log_sum=log_sum,
        owned_sum=parts,
        streamed_sum=parts,
        owners=len(owned),
        streams=len(streamed),
        span=span,
        OWNS_KEYS=owns_keys,
        ATOMIC=False,
    )
    return parts.sum(dim=0)


def _sweep_atomic(
    query: torch.Tensor, key: torch.Tensor, weighted: torch.Tensor, log_sum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`P @ key` and `P.T @ weighted` from one pass, added up in the order in which programs happen to end."""
    from dist_pca.association import triton_programs as programs

    span, splits = _spans(len(key), len(query), key.device, SWEEP_WAVES)
    query_sum = torch.zeros_like(query, dtype=torch.float32)
    key_sum = torch.zeros_like(key, dtype=torch.float32)
    _launch(
        programs.sweep_kernel,
        lambda meta: (_ceil(len(key), meta["ROWS"]), splits),
        len(query) * len(key),
        fixed=False,
        owned=key,
        streamed=query,
        weighted=weighted,
        log_sum=log_sum,
        owned_sum=key_sum,
        streamed_sum=query_sum,
        owners=len(key),
        streams=len(query),
        span=span,
        OWNS_KEYS=True,
        ATOMIC=True,
    )
    return query_sum, key_sum


def _sweep_wide(
    query: torch.Tensor,
    key: torch.Tensor,
    weighted: torch.Tensor,
    log_sum: torch.Tensor,
    key_gradient: torch.Tensor | None,
    *,
    fixed: bool,
) -> torch.Tensor:
    """`P @ key`, and `P.T @ weighted` added to `key_gradient`, one tile of P at a time in scratch memory."""
    n, m = len(query), len(key)
    elements = SCRATCH_BYTES // query.element_size()
    # About square, for then the products read and write the least for each probability.
    columns = _even(m, math.isqrt(elements), SCRATCH_STEP)
    rows = _even(n, max(1, elements // columns), SCRATCH_STEP)
    scratch = query.new_empty((rows, columns))
    query_sum = torch.zeros_like(query, dtype=torch.float32)
    for keys in _slices(m, columns):
        for queries in _slices(n, rows):
            probability = scratch[: queries.stop - queries.start, : keys.stop - keys.start]
            _probabilities(query[queries], key[keys], log_sum[queries], probability, fixed=fixed)
            query_sum[queries] += _product(probability, key[keys])
            if key_gradient is not None:
                key_gradient[keys] += _product(probability.T, weighted[queries])[:, : key_gradient.shape[1]]
    return query_sum


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, log_sum: torch.Tensor, result: torch.Tensor, *, fixed: bool
) -> None:
    """Write `exp(query @ key.T - log_sum)` to `result` [n, m], whose rows may lie apart."""
    from dist_pca.association import triton_programs as programs

    n, m = result.shape
    _launch(
        programs.probability_kernel,
        lambda meta: (_ceil(n, meta["ROWS"]), _ceil(m, meta["COLUMNS"])),
        n * m,
        fixed=fixed,
        query=query,
        key=key,
        log_sum=log_sum,
        probability=result,
        n=n,
        m=m,
        stride=result.stride(0),
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32, of bf16 without a rounding on the way where PyTorch can."""
    if a.is_cuda and a.dtype == torch.bfloat16 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Rows with zero channels added up to a multiple of 16, so that each starts where vectors can be loaded."""
    return F.pad(x, (0, -x.shape[1] % 16)) if x.shape[1] % 16 else x.contiguous()


def _spans(owned: int, streamed: int, device: torch.device, waves: int) -> tuple[int, int]:
    """Streamed rows for one program, and programs for a block of owned rows: so many that all processors have work."""
    wanted = max(1, waves * _processors(device) // max(1, _ceil(owned, ROWS)))
    span = _even(streamed, max(ROWS, streamed // wanted), ROWS)
    return span, _ceil(streamed, span)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _roomy(device: torch.device) -> bool:
    """A program may have 160 KB of shared memory, as on data-centre GPUs."""
    properties: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 160 << 10


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _even(length: int, limit: int, multiple: int) -> int:
    """Length of the parts, of about equal length and about `limit` at most, that `length` falls into."""
    return _ceil(_ceil(length, _ceil(length, limit)), multiple) * multiple


def _slices(length: int, part: int) -> list[slice]:
    return [slice(start, min(start + part, length)) for start in range(0, length, part)]


def _launch(
    kernel: Any, grid: Callable[[dict[str, int]], tuple[int, int]], work: int, *, fixed: bool, **arguments: Any
) -> None:
    """Run one of the kernels of `triton_programs` with the fastest block sizes, or with `fixed` ones, not timed.

    The fastest are found anew for each magnitude of `work`, the number of products.
    """
    from dist_pca.association import triton_programs as programs

    rows = next(iter(arguments.values()))
    bf16, channels = rows.dtype == torch.bfloat16, rows.shape[1]
    with torch.cuda.device(rows.get_device()):
        if fixed or programs.INTERPRETED.value:
            shapes = programs.shapes(kernel, bf16, channels)
            shape = shapes[0] if _roomy(rows.device) else shapes[-1]
            kernel[grid](**arguments, C=channels, **shape.all_kwargs())
        else:
            programs.tuned(kernel, bf16, channels, work.bit_length() // 4)[grid](**arguments, C=channels)
