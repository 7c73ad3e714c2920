import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dist_pca.model.projection import Projection, grid_size, resize

STRIDES, CHANNELS = (4, 8, 16), (3, 4, 5)


def maps(height: int = 64, width: int = 96) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, wide, height // stride, width // stride) for stride, wide in zip(STRIDES, CHANNELS, strict=True)
    ]


@given(
    edge=st.integers(1, 300), stride=st.sampled_from([3.5, 4, 7, 8, 14, 16, 32]), grid=st.sampled_from([4, 8, 16, 32])
)
def test_a_grid_covers_the_map_with_the_fewest_cells(edge: int, stride: float, grid: int) -> None:
    (cells, _) = grid_size(torch.empty(1, 1, edge, 1), stride, grid)
    assert (cells - 1) * grid < edge * stride <= cells * grid


@given(factor=st.sampled_from([2, 4, 8]), height=st.integers(1, 4), width=st.integers(1, 4))
def test_a_cell_of_a_coarser_grid_is_the_mean_over_its_area(factor: int, height: int, width: int) -> None:
    fine = torch.randn(2, 3, height * factor, width * factor)
    cells = fine.unflatten(3, (width, factor)).unflatten(2, (height, factor)).mean((3, 5))
    torch.testing.assert_close(resize(fine, [height, width], coarser=True), cells)


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_a_projection_is_two_linear_layers_over_all_maps_side_by_side(stride: int) -> None:
    projection = Projection(CHANNELS, STRIDES, 6, stride)
    size = [64 // stride, 96 // stride]
    resized = [
        resize(feature_map, size, coarser=own < stride) for own, feature_map in zip(STRIDES, maps(), strict=True)
    ]
    weight = torch.cat([layer.get_parameter("weight") for layer in projection.embeddings], dim=1)
    expected = projection.output(F.conv2d(torch.cat(resized, dim=1), weight))
    torch.testing.assert_close(projection(maps()), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 6, *size)


def test_a_projection_of_an_image_depends_on_no_other_of_its_batch() -> None:
    projection = Projection(CHANNELS, STRIDES, 6, 8).train()
    together, alone = projection(maps())[:1], projection([feature_map[:1] for feature_map in maps()])
    torch.testing.assert_close(alone, together)
