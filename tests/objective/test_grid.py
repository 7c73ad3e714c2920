"""Labels and pixels of grid cells are those of the pixels that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.objective.grid import labels_at, pixels_at

CLASSES = 3


@settings(max_examples=50)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_a_cell_has_the_class_that_enough_of_its_pixels_have(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES + 1, (2, 6, 4), generator=generator)
    labels[labels == CLASSES] = 255
    found = labels_at(labels, torch.Size((3, 2)), CLASSES, share=share)
    assert found is not None
    for image in range(2):
        for row in range(3):
            for column in range(2):
                cell = labels[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                counts = [int((cell == label).sum()) for label in range(CLASSES)]
                label = int(found[image, 2 * row + column])
                if max(counts) >= 4 * share and max(counts) > 0:
                    assert counts[label] == max(counts)
                else:
                    assert label == 255


def test_the_nearest_pixels_label_is_taken_where_no_share_is_asked_for() -> None:
    labels = torch.tensor([[[0, 1, 2, 2], [1, 1, 255, 2]]], dtype=torch.uint8)
    found = labels_at(labels, torch.Size((1, 2)), CLASSES)
    assert found is not None
    assert found.tolist() == [[0, 2]]


def test_an_image_without_labels_has_none_on_the_grid() -> None:
    assert labels_at(None, torch.Size((1, 1)), CLASSES) is None
    found = labels_at(torch.full((1, 4, 4), 255), torch.Size((2, 2)), CLASSES, share=0.5)
    assert found is not None
    assert found.eq(255).all()


@pytest.mark.parametrize("level", ["features", "predictions"])
def test_both_levels_are_on_the_features_grid(level: str) -> None:
    features, logits = torch.randn(2, 5, 2, 3), torch.randn(2, CLASSES, 4, 6)
    pixels = pixels_at(level, features, logits, features.shape[-2:])  # type: ignore[arg-type]
    if level == "features":
        assert torch.equal(pixels, features.flatten(2).mT)
    else:
        cell = logits.softmax(dim=1)[1, :, 2:4, 0:2].mean(dim=(1, 2))
        torch.testing.assert_close(pixels[1, 3], cell)
        torch.testing.assert_close(pixels.sum(dim=2), torch.ones(2, 6))
