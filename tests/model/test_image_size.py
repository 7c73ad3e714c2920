"""Backbones of a fixed size: which sizes they take, is found out before any weights are read."""

import pytest
import torch

from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.backbone import BackboneOptions, build_backbone, check_size, fit_image_size, takes_size
from dist_pca.model.segmenter import build_network, fit_to_crop

FIXED = ["test_maxvit", "test_coatnet", "test_vit_relpos", "gcvit_xxtiny", "beit_base_patch16_224", "hiera_tiny_224"]


@pytest.mark.parametrize("name", FIXED)
def test_a_network_of_a_fixed_size_is_built_for_the_crop(name: str) -> None:
    options = BackboneOptions(name)
    assert not takes_size(options, (96, 192))
    fitted = fit_image_size(options, (96, 192))
    assert fitted.image_size == (96, 192)
    check_size(fitted, (96, 192), "data.crop")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_a_network_for_images_of_any_size_keeps_its_own(name: str) -> None:
    options = BackboneOptions(name)
    assert fit_image_size(options, (96, 200)) == options
    for size in ((96, 200), (61, 333), (512, 512)):
        check_size(options, size, "data.crop")


def test_the_size_is_that_to_which_images_are_resized_for_the_network() -> None:
    config = ModelConfig(backbone="test_maxvit", weights="scratch", output_stride=None, head="pyramid")
    fitted = fit_to_crop(config, (100, 200))
    assert fitted.image_size == (96, 192)
    logits = build_network(fitted, 3).eval()(torch.zeros(1, 3, 100, 200)).logits
    assert logits.shape[-2:] == (24, 48)
    assert fit_image_size(BackboneOptions("test_maxvit", bands=4), (100, 200)).image_size == (96, 192)


@pytest.mark.parametrize(
    ("name", "size", "named"),
    [
        # timm builds it for squares alone, or for its own size alone, or only for whole blocks of 8 positions.
        ("nest_tiny", (256, 512), r"\[224, 224\]$"),
        ("efficientformer_l1", (256, 512), r"\[224, 224\]$"),
        ("halonet26t", (500, 300), r"\[512, 256\] or \[512, 512\] or \[256, 256\]$"),
        ("gcvit_xxtiny", (256, 512), r"\[224, 224\]$"),
        ("test_maxvit", (300, 330), r"\[320, 320\] or \[160, 160\]$"),
    ],
)
def test_a_size_that_cannot_be_taken_is_refused_with_sizes_that_can(
    name: str, size: tuple[int, int], named: str
) -> None:
    message = rf"^data\.crop: {name} cannot take images of {size[0]} x {size[1]} pixels; set it to a size .*, {named}"
    with pytest.raises(UserError, match=message):
        check_size(BackboneOptions(name), size, "data.crop")


def test_a_size_given_by_hand_is_kept_and_one_that_timm_does_not_know_is_refused() -> None:
    by_hand = BackboneOptions("test_maxvit", None, (64, 64))
    assert fit_image_size(by_hand, (96, 192)) == by_hand
    with pytest.raises(UserError, match=r"^model\.image_size: timm cannot build test_resnet for images of "):
        build_backbone("test_resnet", 8, (64, 64))


def test_another_size_met_while_running_is_one_line_and_other_errors_stay() -> None:
    backbone = build_backbone("test_maxvit", None).eval()
    with pytest.raises(
        UserError, match=r"^data\.crop or evaluation\.window: test_maxvit cannot take images of 96 x 192"
    ):
        backbone(torch.zeros(1, 3, 96, 192))
    with pytest.raises(RuntimeError, match="channels"):
        backbone(torch.zeros(1, 4, 160, 160))


def test_trying_sizes_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fit_image_size(BackboneOptions("test_vit4", None), (64, 128))
    fit_image_size(BackboneOptions("test_maxvit", None), (64, 128))
    assert torch.equal(torch.get_rng_state(), before)
