# mypy: allow-untyped-decorators
"""Device code of the fused kernels that `triton_launch` launches.

Every program has a stationary block of rows of one operand, and iterates over blocks of rows of the streaming operand;
the [n, m] matrix of logits exists one tile at a time, in registers. Pointers advance by whole blocks, so offsets within
a block fit in 32 bits while n * C does not have to. Accumulation is in fp32. Exponentials are powers of two:
exp(x) = 2^(x log2 e).
"""

import functools
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# (rows, columns, warps, stages) to choose from, by the most channels they suit. The first are used without timing on
# data-centre GPUs; the last fit the 99 KB of shared memory of smaller ones. None spills more than a few registers.
MATCH_SIZES = {
    128: [(128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    256: [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)],
}
BACKWARD_SIZES = {
    True: {
        32: [(128, 64, 8, 3), (256, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)],
        128: [(128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
        256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 4, 2)],
    },
    False: {32: [(64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)], 64: [(64, 32, 8, 2), (32, 32, 4, 2)]},
}
# For matmuls whose channels (K) go through shared memory a block at a time.
K_BLOCKED_SIZES = {
    True: [(128, 128, 8, 3), (128, 256, 8, 3), (128, 128, 8, 4), (128, 64, 4, 4), (64, 128, 4, 4)],
    False: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2)],
}
K_BLOCK = {True: 64, False: 16}


@triton.jit
def _rows(
    base: tl.tensor,
    count: tl.tensor,
    first_channel: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Load [ROWS, CHANNELS] from a matrix [count, C] at `base`; zero from row `count` and channel `C` on."""
    row = tl.arange(0, ROWS)[:, None]
    channel = first_channel + tl.arange(0, CHANNELS)[None, :]
    mask = row < count
    if C % CHANNELS != 0:
        mask = mask & (channel < C)
    return tl.load(base + row * C + channel, mask=mask, other=0.0)


INTERPRETED = tl.constexpr(not isinstance(_rows, triton.JITFunction))


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Compute `total + a @ b`, accumulated in fp32."""
    if INTERPRETED:
        # The interpreter represents bf16 as integers and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _logits(
    query: tl.tensor,
    key: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Compute `query @ key.T` [ROWS, COLUMNS] of two blocks of rows, K-blocked: CHANNELS channels at a time."""
    # z_ij = sum_c q_ic k_jc.
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for channel in range(0, C, CHANNELS):
        q = _rows(query, queries, channel, C, ROWS, CHANNELS)
        k = _rows(key, keys, channel, C, COLUMNS, CHANNELS)
        z = _dot(q, k.T, z)
    return z


@triton.jit(do_not_specialize=["n", "m", "chunk"])
def match_kernel(
    query: tl.tensor,
    key: tl.tensor,
    logit: tl.tensor,
    index: tl.tensor,
    logsumexp: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    chunk: tl.tensor,
    C: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Compute maximum, its lowest index and log-sum-exp of the logits of each query over a chunk of keys.

    Program (b, s): query block b over keys [s * chunk, (s + 1) * chunk), written to row s of each result [chunks, n].
    Without LOGSUMEXP nothing is written to `logsumexp`.
    """
    # Query block [ROWS, C] at `query`, of which `queries` rows exist; keys [first, last) at `key`.
    start_row = tl.program_id(0).to(tl.int64) * ROWS
    queries = (n - start_row).to(tl.int32)
    query += start_row * C
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, m)
    key += first.to(tl.int64) * C

    # Narrow queries stay in registers; wide ones are loaded again, K-blocked, for every tile.
    RESIDENT: tl.constexpr = C <= CHANNELS
    if RESIDENT:
        q = _rows(query, queries, 0, C, ROWS, CHANNELS)
    # Running maximum m_i, its key, and running sum l_i = sum_j exp(z_ij - m_i).
    best = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    best_index = tl.full((ROWS,), 0, dtype=tl.int32) + first
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        # z = q k', a tile [ROWS, COLUMNS] of which `keys` columns exist.
        keys = last - start
        if RESIDENT:
            k = _rows(key, keys, 0, C, COLUMNS, CHANNELS)
            z = _dot(q, k.T, tl.zeros((ROWS, COLUMNS), dtype=tl.float32))
        else:
            z = _logits(query, key, queries, keys, C, ROWS, COLUMNS, CHANNELS)
        key += COLUMNS * C

        # Maximum of the tile and its lowest key.
        column = tl.arange(0, COLUMNS)[None, :]
        z = tl.where(column < keys, z, float("-inf"))
        tile_best = tl.max(z, axis=1)
        tile_index = start + tl.min(tl.where(z == tile_best[:, None], column, COLUMNS - 1), axis=1)
        # Strictly greater only: on ties the earlier tile has the lower index.
        best_index = tl.where(tile_best > best, tile_index, best_index)
        new_best = tl.maximum(best, tile_best)
        if LOGSUMEXP:
            # l_i <- l_i exp(m_i - m_i') + sum_j exp(z_ij - m_i'). Every tile has a key that exists, so the new maximum
            # m_i' is finite and -inf - -inf does not arise.
            weight = tl.exp2(z * LOG2_E - (new_best * LOG2_E)[:, None])
            total = total * tl.exp2((best - new_best) * LOG2_E) + tl.sum(weight, axis=1)
        best = new_best

    row = tl.arange(0, ROWS)
    mask = row < queries
    out = tl.program_id(1).to(tl.int64) * n + start_row
    tl.store(logit + out + row, best, mask=mask)
    tl.store(index + out + row, best_index.to(tl.int64), mask=mask)
    if LOGSUMEXP:
        # log sum_j exp(z_ij) = m_i + log l_i.
        tl.store(logsumexp + out + row, best + tl.log2(total) * LN_2, mask=mask)


@triton.jit(do_not_specialize=["n", "m", "stride"])
def probability_kernel(
    query: tl.tensor,
    key: tl.tensor,
    logsumexp: tl.tensor,
    probability: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    stride: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Compute `exp(query @ key.T - logsumexp)` [n, m], rounded to the type of `probability`.

    Program (i, j): tile [ROWS, COLUMNS] of query block i and key block j; rows of the result are `stride` apart.
    """
    # Groups of 8 query blocks share the key blocks they read while these are in the cache.
    i, j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    start_row, start_column = i.to(tl.int64) * ROWS, j.to(tl.int64) * COLUMNS
    queries, keys = (n - start_row).to(tl.int32), (m - start_column).to(tl.int32)
    # z = q k'.
    z = _logits(query + start_row * C, key + start_column * C, queries, keys, C, ROWS, COLUMNS, CHANNELS)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # p_ij = exp(z_ij - logsumexp_i).
    shift = tl.load(logsumexp + start_row + row, mask=row < queries, other=0.0)
    p = tl.exp2(z * LOG2_E - (shift * LOG2_E)[:, None])
    out = probability + start_row * stride + start_column + row[:, None] * stride + column[None, :]
    mask = (row < queries)[:, None] & (column < keys)[None, :]
    tl.store(out, p.to(probability.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_stationary", "n_streaming", "chunk"])
def backward_kernel(
    stationary: tl.tensor,
    streaming: tl.tensor,
    values: tl.tensor,
    logsumexp: tl.tensor,
    stationary_sum: tl.tensor,
    streaming_sum: tl.tensor,
    n_stationary: tl.tensor,
    n_streaming: tl.tensor,
    chunk: tl.tensor,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS_STATIONARY: tl.constexpr,
    ATOMIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Compute `P @ key` or `P.T @ values`, or both, with `P = exp(query @ key.T - logsumexp)`.

    Program (b, s): stationary block b over streaming rows [s * chunk, (s + 1) * chunk).

    Queries stationary: sum of `P @ key`, stored in row s of stationary_sum [chunks, n, C].
    Keys stationary: sum of `P.T @ values`, stored in row s of stationary_sum [chunks, m, C]. With ATOMIC it is added to
    stationary_sum [m, C] instead, and `P @ key`, of which every block of keys gives a part, to streaming_sum [n, C].
    """
    # Stationary block [ROWS, C], of which `count` rows exist.
    start_row = tl.program_id(0).to(tl.int64) * ROWS
    count = (n_stationary - start_row).to(tl.int32)
    fixed = _rows(stationary + start_row * C, count, 0, C, ROWS, CHANNELS)
    # Streaming rows [first, last), with their values and sums.
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, n_streaming)
    streaming += first.to(tl.int64) * C
    values += first.to(tl.int64) * C
    streaming_sum += first.to(tl.int64) * C

    row, column, channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, CHANNELS)
    if not KEYS_STATIONARY:
        shift = tl.load(logsumexp + start_row + row, mask=row < count, other=0.0)[:, None] * LOG2_E
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        # Logits z, a tile [ROWS, COLUMNS] of which `left` columns exist.
        left = last - start
        block = _rows(streaming, left, 0, C, COLUMNS, CHANNELS)
        z = _dot(fixed, block.T, tl.zeros((ROWS, COLUMNS), dtype=tl.float32))
        # Rows that do not exist are zero, but exp(0 - logsumexp) may be infinite, and infinity times zero is not a
        # number: absent keys get no probability wherever keys are summed over. Absent queries have an infinite
        # logsumexp; 0 would do, but with it ptxas lets the matmuls of some shapes wait for each other on sm_90.
        if KEYS_STATIONARY:
            # p_ji = exp(z_ji - logsumexp_i), and dk_j += sum_i p_ji values_i.
            shift = tl.load(logsumexp + start + column, mask=column < left, other=float("inf"))[None, :] * LOG2_E
            p = tl.exp2(z * LOG2_E - shift)
            if ATOMIC:
                p = tl.where((row < count)[:, None], p, 0.0)
            p = p.to(fixed.dtype)
            total = _dot(p, _rows(values, left, 0, C, COLUMNS, CHANNELS), total)
            values += COLUMNS * C
        else:
            # p_ij = exp(z_ij - logsumexp_i), and (P K)_i += sum_j p_ij k_j.
            p = tl.where((column < left)[None, :], tl.exp2(z * LOG2_E - shift), 0.0).to(fixed.dtype)
            total = _dot(p, block, total)
        streaming += COLUMNS * C
        if ATOMIC:
            # (P K)_i += sum_j p_ji k_j over this block of keys.
            part = _dot(p.T, fixed, tl.zeros((COLUMNS, CHANNELS), dtype=tl.float32))
            mask = (column < left)[:, None] & (channel < C)[None, :]
            tl.atomic_add(streaming_sum + column[:, None] * C + channel[None, :], part, mask=mask, sem="relaxed")
            streaming_sum += COLUMNS * C

    mask = (row < count)[:, None] & (channel < C)[None, :]
    out = start_row * C + row[:, None] * C + channel[None, :]
    if ATOMIC:
        tl.atomic_add(stationary_sum + out, total, mask=mask, sem="relaxed")
    else:
        tl.store(stationary_sum + tl.program_id(1).to(tl.int64) * n_stationary * C + out, total, mask=mask)


def shapes(kernel: Any, bf16: bool, channels: int) -> list[triton.Config]:
    """List launch configurations for a type (bf16 or fp32) and a width of the rows [channels]."""
    k_block = max(16, triton.next_power_of_2(channels))
    if kernel is backward_kernel:
        sizes = next(sizes for width, sizes in BACKWARD_SIZES[bf16].items() if k_block <= width)
    elif kernel is match_kernel and bf16 and k_block <= max(MATCH_SIZES):
        sizes = next(sizes for width, sizes in MATCH_SIZES.items() if k_block <= width)
    else:
        k_block, sizes = min(k_block, K_BLOCK[bf16]), K_BLOCKED_SIZES[bf16]
    if INTERPRETED.value:
        sizes = [(32, 32, 4, 1)]
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns, "CHANNELS": k_block}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in sizes
    ]


@functools.cache
def tuned(kernel: Any, variant: tuple[bool, ...], bf16: bool, channels: int, magnitude: int) -> Any:
    """Tune a kernel: its shapes are timed on the first call for each variant, type, width and magnitude of work.

    Variants, which are the kernel's compile-time flags, differ in the shared memory that a shape takes.
    """
    sums = ["stationary_sum", "streaming_sum"] if kernel is backward_kernel else None
    return triton.autotune(shapes(kernel, bf16, channels), key=[], reset_to_zero=sums)(kernel)
