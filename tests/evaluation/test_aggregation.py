import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.association import diffuse
from dist_pca.evaluation.aggregation import aggregated_logits
from dist_pca.model.segmenter import Segmenter
from tests.support.networks import segmenter

NETWORKS = {
    "classifier": segmenter(association_features="head"),
    "pyramid": segmenter(),
    "deeplab": segmenter(head="deeplab_v2", output_stride=8),
    "deeplab, named otherwise": segmenter(head="deeplab_v2", output_stride=8, association_features="head"),
}
images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def mixed(values: torch.Tensor, share: float, similarity: str) -> torch.Tensor:
    rows = diffuse(values.flatten(2).transpose(1, 2), share, similarity)  # type: ignore[arg-type]
    back: torch.Tensor = rows.transpose(1, 2).unflatten(2, values.shape[-2:])
    return back


def by_hand(model: Segmenter, share: float) -> torch.Tensor:
    """Probabilities of the network taken apart."""
    maps = model.backbone((images - model.mean) / model.std)
    if model.association_features == "head" and hasattr(model.head, "classifier"):
        logits = model.head.get_submodule("classifier")(mixed(model.head(maps).features, share, "cosine"))
    else:
        logits = model.head([*maps[:-1], mixed(maps[-1], share, "cosine")]).logits
    return mixed(logits.softmax(1), share, "kl")


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_features_are_mixed_before_the_classifier_and_probabilities_after_it(name: str) -> None:
    model = NETWORKS[name]
    found = aggregated_logits(model, images, 0.5).softmax(1)
    torch.testing.assert_close(found, by_hand(model, 0.5), rtol=1e-4, atol=1e-6)
    assert (found - model(images).logits.softmax(1)).abs().max() > 1e-3


@settings(max_examples=10)
@given(name=st.sampled_from(sorted(NETWORKS)))
@torch.no_grad()
def test_a_share_of_nothing_gives_the_networks_own_probabilities(name: str) -> None:
    model = NETWORKS[name]
    found = aggregated_logits(model, images, 0.0).softmax(1)
    torch.testing.assert_close(found, model(images).logits.softmax(1), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_network_is_left_as_it_was() -> None:
    model = NETWORKS["classifier"]
    before = model(images).logits
    aggregated_logits(model, images, 0.5)
    assert torch.equal(model(images).logits, before)


@torch.no_grad()
def test_images_do_not_mix() -> None:
    model = NETWORKS["pyramid"]
    together, alone = aggregated_logits(model, images, 0.5)[:1], aggregated_logits(model, images[:1], 0.5)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
