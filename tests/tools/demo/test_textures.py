from typing import get_args

import numpy as np
import pytest

from dist_pca.tools.demo.looks import Texture
from dist_pca.tools.demo.textures import TILE, tile


@pytest.mark.parametrize("kind", get_args(Texture))
def test_a_tile_varies_around_one(kind: Texture) -> None:
    values = tile(kind)
    assert values.shape == (TILE, TILE)
    assert abs(values.mean() - 1) < 0.25
    assert values.std() > 0.03


def test_no_two_tiles_are_the_same() -> None:
    tiles = [tile(kind) for kind in get_args(Texture)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(tiles) for b in tiles[:i])


@pytest.mark.parametrize("kind", ["plaster", "asphalt", "foliage"])
def test_tiles_of_noise_join_without_a_seam(kind: Texture) -> None:
    values = tile(kind)
    across_seam = np.abs(values[:, 0] - values[:, -1]).mean()
    assert across_seam < 1.2 * np.abs(np.diff(values, axis=1)).mean()
