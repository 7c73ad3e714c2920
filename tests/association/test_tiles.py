"""Products of tiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_pca.association.tiles import matmul

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda wide: wide[:, :24].contiguous(),
    "columns": lambda wide: wide[:, :24].T.contiguous().T,
    "a slice of columns": lambda wide: wide[:, :24],
    "every other row": lambda wide: wide[::2],
}


class Weights(TorchDispatchMode):
    """Keeps the second operand of every product that oneDNN makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in str(func):
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_is_the_same_in_every_layout_and_onednn_gets_none_that_it_is_slow_with(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    right = LAYOUTS[layout](torch.randn(40, 48, generator=generator))
    left = torch.randn(16, len(right), generator=generator)
    with Weights() as weights:
        product = matmul(left, right)
    torch.testing.assert_close(product, left @ right)
    assert all(weight.is_contiguous() or weight.T.is_contiguous() for weight in weights.seen)
