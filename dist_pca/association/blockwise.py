"""Tiles of the similarity matrix in plain PyTorch, on any device: small enough to stay in the cache, never the whole.

A tile is a block of query rows against a block of keys. Its products may be in bf16; what is summed is summed in fp32.
"""

from typing import NamedTuple

import torch

CPU_TILE_BYTES, GPU_TILE_BYTES = 8 << 20, 256 << 20
"""Memory for one tile. On a CPU larger ones fall out of its cache, and every pass over them waits for memory."""
ROW_GROUP = 32
"""Rows of a tile come in multiples of this."""
MIN_ROWS = 256
"""Rows of a tile, whatever its memory: with fewer, products wait for the keys, which every tile reads anew."""
GROUP = 64
"""Columns whose maximum is taken first: PyTorch's maximum is vectorised on CPUs, its argmax is not."""


KEY_ROWS = 2048
"""Rows of a gradient with respect to keys that a CPU works on at a time."""
# On processors to which MKL gives no AVX-512, oneDNN multiplies twice as fast; PyTorch asks it for bf16 by itself.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


class Match(NamedTuple):
    """What one pass over key rows tells of each of n query rows."""

    value: torch.Tensor
    """[n], the largest product with a key row."""
    best: torch.Tensor
    """int64 [n], that key row; the lowest where several tie."""
    squares: torch.Tensor | None
    """[n], sum of squared products, from kernels that give it."""
    log_sum: torch.Tensor | None
    """[n], logarithm of the sum of the products' exponentials, where it was asked for."""


def row_blocks(rows: int, columns: int, device: torch.device, element_size: int = 4) -> list[slice]:
    """Slices of rows that make tiles of the memory budget, at so many bytes per product."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    height = max(MIN_ROWS, budget // max(1, element_size * columns) // ROW_GROUP * ROW_GROUP)
    return [slice(start, start + height) for start in range(0, rows, height)]


def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[n, m] products of query rows and key rows, in fp32 or more."""
    return widened(product(query, key.T))


def widened(tile: torch.Tensor) -> torch.Tensor:
    """In fp32 or more: the tile itself where it is that already."""
    return tile.to(torch.promote_types(tile.dtype, torch.float32))


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix product. That of bf16 is summed in fp32; GPUs give it in fp32 too, CPUs can only give it rounded."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    if _ONEDNN and left.device.type == "cpu" and left.dtype == torch.float32 and left.numel() and right.numel():
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
        return found
    return left @ right


def row_maximum(tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value of each row and its column, the lowest where several tie, of [n, m]."""
    columns = tile.shape[1]
    if tile.is_cuda or columns < 4 * GROUP:
        value, index = tile.max(dim=1)
        return value, index
    whole = columns // GROUP * GROUP
    maxima = torch.unflatten(tile[:, :whole], 1, (-1, GROUP)).amax(dim=2)
    if whole < columns:
        maxima = torch.cat([maxima, tile[:, -GROUP:].amax(dim=1, keepdim=True)], dim=1)
    first = (maxima.argmax(dim=1) * GROUP).clamp(max=columns - GROUP)
    candidates = first[:, None] + torch.arange(GROUP, device=tile.device)
    inner = tile.gather(1, candidates)
    within = inner.argmax(dim=1, keepdim=True)
    return inner.gather(1, within)[:, 0], first + within[:, 0]


def match(query: torch.Tensor, key: torch.Tensor, *, log_sum: bool, deterministic: bool = False) -> Match:
    """Best key row of each query row, and the log-sum-exp of its products where asked. Shapes [n, C] and [m, C].

    The same bits every time, whatever `deterministic` asks for.
    """
    tile = scores(query, key)
    value, index = row_maximum(tile)
    total = value + (tile - value[:, None]).exp_().sum(dim=1).log_() if log_sum else None
    return Match(value, index, None, total)


def sweep(
    query: torch.Tensor,
    key: torch.Tensor,
    weighted: torch.Tensor,
    log_sum: torch.Tensor,
    key_gradient: torch.Tensor | None,
    *,
    deterministic: bool,
) -> torch.Tensor:
    """With `P = exp(query @ key.T - log_sum)`: gives `P @ key`, [n, C], and adds `P.T @ weighted` to key_gradient.

    Args:
        query: [n, C], scaled by the rows' temperatures.
        key: [m, C].
        weighted: [n, C].
        log_sum: [n].
        key_gradient: [m, C] in fp32 or more; None where keys have no gradient.
        deterministic: Same bits every time, which this always gives.
    """
    tile = scores(query, key)
    return pull_both(tile.sub_(log_sum[:, None]).exp_(), key, weighted, key_gradient)


def pull_both(
    probabilities: torch.Tensor, key: torch.Tensor, weighted: torch.Tensor, key_gradient: torch.Tensor | None
) -> torch.Tensor:
    """`P @ key`, [n, C], and `P.T @ weighted` added to key_gradient [m, C] if there is one, for a tile P [n, m]."""
    probabilities = probabilities.to(key.dtype)
    if key_gradient is None:
        return widened(product(probabilities, key))
    if key.is_cuda and key.dtype != torch.bfloat16:
        key_gradient.addmm_(probabilities.T, weighted)
    elif key.is_cuda:
        key_gradient += product(probabilities.T, weighted)
    else:
        # In parts that are still in the cache when they are added.
        for columns, part in zip(
            torch.split(probabilities, KEY_ROWS, dim=1), torch.split(key_gradient, KEY_ROWS), strict=True
        ):
            part += product(columns.T, weighted)
    return widened(product(probabilities, key))
