# mypy: allow-untyped-decorators
"""Device code of the fused kernels, for `triton_kernels`: what one Triton program does with one block of rows.

Every program owns a block of rows of one matrix and streams blocks of rows of the other past it; the n x m matrix of
products exists one tile at a time, in registers. Pointers advance by whole blocks, so offsets within a block fit in 32
bits while n * C does not have to. Sums are fp32. Exponentials are powers of two, log2(e) folded into the exponent.
"""

import functools
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Rows, columns, warps and stages to choose from, by the most channels they suit. The first are taken without timing on
# data-centre GPUs; the last fit the 99 KB of shared memory of smaller ones. None spills more than a few registers.
MATCH_SIZES = {
    128: [(128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    256: [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)],
}
SWEEP_SIZES = {
    True: {
        32: [(128, 64, 8, 3), (256, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)],
        128: [(128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
        256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 4, 2)],
    },
    False: {32: [(64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)], 64: [(64, 32, 8, 2), (32, 32, 4, 2)]},
}
# For products whose channels go through shared memory a few at a time.
STEPPED_SIZES = {
    True: [(128, 128, 8, 3), (128, 256, 8, 3), (128, 128, 8, 4), (128, 64, 4, 4), (64, 128, 4, 4)],
    False: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2)],
}
STEP = {True: 64, False: 16}


@triton.jit
def _rows(
    base: tl.tensor,
    count: tl.tensor,
    first_channel: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Rows and channels [ROWS, CHANNELS] at `base`, zero from row `count` and channel `C` on."""
    row = tl.arange(0, ROWS)[:, None]
    channel = first_channel + tl.arange(0, CHANNELS)[None, :]
    present = row < count
    if C % CHANNELS != 0:
        present = present & (channel < C)
    return tl.load(base + row * C + channel, mask=present, other=0.0)


INTERPRETED = tl.constexpr(not isinstance(_rows, triton.JITFunction))


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + a @ b, accumulated in fp32."""
    if INTERPRETED:
        # The interpreter keeps bf16 as integers and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _products(
    query: tl.tensor,
    key: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Products [ROWS, COLUMNS] of two blocks of rows, some channels at a time."""
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for channel in range(0, C, CHANNELS):
        q = _rows(query, queries, channel, C, ROWS, CHANNELS)
        k = _rows(key, keys, channel, C, COLUMNS, CHANNELS)
        z = _dot(q, k.T, z)
    return z


@triton.jit(do_not_specialize=["n", "m", "span"])
def match_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    index: tl.tensor,
    squares: tl.tensor,
    log_sum: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    span: tl.tensor,
    C: tl.constexpr,
    LOG_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Program (b, s): maximum, its lowest index, sum of squares, log-sum-exp of query block b over key rows
    [s * span, (s + 1) * span), written to row s of each result [splits, n]."""
    start_row = tl.program_id(0).to(tl.int64) * ROWS
    queries = (n - start_row).to(tl.int32)
    query += start_row * C
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, m)
    key += first.to(tl.int64) * C

    RESIDENT: tl.constexpr = C <= CHANNELS
    if RESIDENT:
        q = _rows(query, queries, 0, C, ROWS, CHANNELS)
    best = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    best_index = tl.full((ROWS,), 0, dtype=tl.int32) + first
    second = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        keys = last - start
        if RESIDENT:
            k = _rows(key, keys, 0, C, COLUMNS, CHANNELS)
            z = _dot(q, k.T, tl.zeros((ROWS, COLUMNS), dtype=tl.float32))
        else:
            z = _products(query, key, queries, keys, C, ROWS, COLUMNS, CHANNELS)
        key += COLUMNS * C

        second += tl.sum(z * z, axis=1)
        column = tl.arange(0, COLUMNS)[None, :]
        z = tl.where(column < keys, z, float("-inf"))
        block_best = tl.max(z, axis=1)
        block_index = start + tl.min(tl.where(z == block_best[:, None], column, COLUMNS - 1), axis=1)
        # Strictly larger only: on ties the earlier block holds the lower index.
        best_index = tl.where(block_best > best, block_index, best_index)
        new_best = tl.maximum(best, block_best)
        if LOG_SUM:
            # Every block has a key that exists, so the new maximum is finite and -inf - -inf does not arise.
            weight = tl.exp2(z * LOG2_E - (new_best * LOG2_E)[:, None])
            total = total * tl.exp2((best - new_best) * LOG2_E) + tl.sum(weight, axis=1)
        best = new_best

    row = tl.arange(0, ROWS)
    present = row < queries
    out = tl.program_id(1).to(tl.int64) * n + start_row
    tl.store(value + out + row, best, mask=present)
    tl.store(index + out + row, best_index.to(tl.int64), mask=present)
    tl.store(squares + out + row, second, mask=present)
    if LOG_SUM:
        tl.store(log_sum + out + row, best + tl.log2(total) * LN_2, mask=present)


@triton.jit(do_not_specialize=["n", "m", "stride"])
def probability_kernel(
    query: tl.tensor,
    key: tl.tensor,
    log_sum: tl.tensor,
    probability: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    stride: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Program (i, j): one tile of exp(query @ key.T - log_sum), rounded to the type of `probability`."""
    # Groups of query blocks share the key blocks they read while these are in the cache.
    i, j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    start_row, start_column = i.to(tl.int64) * ROWS, j.to(tl.int64) * COLUMNS
    queries, keys = (n - start_row).to(tl.int32), (m - start_column).to(tl.int32)
    z = _products(query + start_row * C, key + start_column * C, queries, keys, C, ROWS, COLUMNS, CHANNELS)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    shift = tl.load(log_sum + start_row + row, mask=row < queries, other=0.0)
    p = tl.exp2(z * LOG2_E - (shift * LOG2_E)[:, None])
    out = probability + start_row * stride + start_column + row[:, None] * stride + column[None, :]
    present = (row < queries)[:, None] & (column < keys)[None, :]
    tl.store(out, p.to(probability.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["owners", "streams", "span"])
def sweep_kernel(
    owned: tl.tensor,
    streamed: tl.tensor,
    weighted: tl.tensor,
    log_sum: tl.tensor,
    owned_sum: tl.tensor,
    streamed_sum: tl.tensor,
    owners: tl.tensor,
    streams: tl.tensor,
    span: tl.tensor,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    OWNS_KEYS: tl.constexpr,
    ATOMIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Program (b, s): owned block b past streamed rows [s * span, (s + 1) * span).

    Owning queries: sum of `P @ key`, stored in row s of owned_sum [splits, n, C].
    Owning keys: sum of `P.T @ weighted`, stored in row s of owned_sum [splits, m, C]. With ATOMIC it is added to
    owned_sum [m, C] instead, and `P @ key`, of which every block of keys holds a part, to streamed_sum [n, C].
    """
    start_row = tl.program_id(0).to(tl.int64) * ROWS
    count = (owners - start_row).to(tl.int32)
    own = _rows(owned + start_row * C, count, 0, C, ROWS, CHANNELS)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, streams)
    streamed += first.to(tl.int64) * C
    weighted += first.to(tl.int64) * C
    streamed_sum += first.to(tl.int64) * C

    row, column, channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, CHANNELS)
    if not OWNS_KEYS:
        shift = tl.load(log_sum + start_row + row, mask=row < count, other=0.0)[:, None] * LOG2_E
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        left = last - start
        block = _rows(streamed, left, 0, C, COLUMNS, CHANNELS)
        z = _dot(own, block.T, tl.zeros((ROWS, COLUMNS), dtype=tl.float32))
        # Rows that do not exist are zero, but exp(0 - log_sum) may be infinite, and infinity times zero is not a
        # number: absent keys get no probability wherever keys are summed over. Absent queries have an infinite log_sum;
        # 0 would do, but with it ptxas lets the products of some shapes wait for each other on sm_90.
        if OWNS_KEYS:
            shift = tl.load(log_sum + start + column, mask=column < left, other=float("inf"))[None, :] * LOG2_E
            p = tl.exp2(z * LOG2_E - shift)
            if ATOMIC:
                p = tl.where((row < count)[:, None], p, 0.0)
            p = p.to(own.dtype)
            total = _dot(p, _rows(weighted, left, 0, C, COLUMNS, CHANNELS), total)
            weighted += COLUMNS * C
        else:
            p = tl.where((column < left)[None, :], tl.exp2(z * LOG2_E - shift), 0.0).to(own.dtype)
            total = _dot(p, block, total)
        streamed += COLUMNS * C
        if ATOMIC:
            part = _dot(p.T, own, tl.zeros((COLUMNS, CHANNELS), dtype=tl.float32))
            present = (column < left)[:, None] & (channel < C)[None, :]
            tl.atomic_add(streamed_sum + column[:, None] * C + channel[None, :], part, mask=present, sem="relaxed")
            streamed_sum += COLUMNS * C

    present = (row < count)[:, None] & (channel < C)[None, :]
    out = start_row * C + row[:, None] * C + channel[None, :]
    if ATOMIC:
        tl.atomic_add(owned_sum + out, total, mask=present, sem="relaxed")
    else:
        tl.store(owned_sum + tl.program_id(1).to(tl.int64) * owners * C + out, total, mask=present)


def shapes(kernel: Any, bf16: bool, channels: int) -> list[triton.Config]:
    """Launch configurations to choose from, by type (bf16 or fp32) and width of the rows."""
    step = max(16, triton.next_power_of_2(channels))
    if kernel is sweep_kernel:
        sizes = next(sizes for width, sizes in SWEEP_SIZES[bf16].items() if step <= width)
    elif kernel is match_kernel and bf16 and step <= max(MATCH_SIZES):
        sizes = next(sizes for width, sizes in MATCH_SIZES.items() if step <= width)
    else:
        step, sizes = min(step, STEP[bf16]), STEPPED_SIZES[bf16]
    if INTERPRETED.value:
        sizes = [(32, 32, 4, 1)]
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns, "CHANNELS": step}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in sizes
    ]


@functools.cache
def tuned(kernel: Any, bf16: bool, channels: int, magnitude: int) -> Any:
    """The kernel with the fastest of its shapes, timed on the first call for a type, width and magnitude of work."""
    sums = ["owned_sum", "streamed_sum"] if kernel is sweep_kernel else None
    return triton.autotune(shapes(kernel, bf16, channels), key=[], reset_to_zero=sums)(kernel)
