import pytest
import torch

from dist_pca.config import ModelConfig
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter


def build(backbone: str, **changes: object) -> Segmenter:
    torch.manual_seed(0)
    values = {"weights": "scratch", "output_stride": None, "head": "pyramid", "head_channels": 16} | changes
    return build_segmenter(ModelConfig.model_validate({"backbone": backbone} | values), 5)


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("backbone", "output_stride", "feature_size", "logit_size"),
    [
        ("test_resnet", 8, (10, 12), (10, 12)),
        ("test_efficientnet", 8, (10, 12), (10, 12)),
        ("tf_efficientnet_lite0", None, (2, 3), (8, 12)),
        ("test_convnext", 8, (9, 11), (9, 11)),
        ("test_convnext", None, (2, 3), (8, 12)),
        ("swin_tiny_patch4_window7_224", None, (2, 3), (8, 12)),
        ("test_vit", 16, (5, 6), (5, 6)),
        ("vit_small_patch14_dinov2", None, (5, 6), (5, 6)),
        ("vit_small_patch16_dinov3", None, (5, 6), (5, 6)),
    ],
)
def test_every_family_segments_and_trains_on_images_of_an_odd_size(
    backbone: str, output_stride: int | None, feature_size: tuple[int, int], logit_size: tuple[int, int]
) -> None:
    segmenter = build(backbone, output_stride=output_stride)
    output = segmenter(noise(73, 91))
    assert output.logits.shape == (2, 5, *logit_size)
    assert output.features.shape == (2, segmenter.backbone.channels[-1], *feature_size)
    output.logits.square().sum().backward()
    assert [name for name, parameter in segmenter.named_parameters() if parameter.grad is None] == []


def test_resnet_features_are_those_after_relu() -> None:
    features = build("resnet18", output_stride=8, head="deeplab_v2")(noise(64, 64)).features
    assert (features >= 0).all()
    assert (features == 0).any()


def test_a_transformer_sees_the_whole_image_on_its_grid() -> None:
    segmenter = build("test_vit").eval()
    images = noise(64, 96)
    stretched = torch.nn.functional.interpolate(images.float() / 255, (70, 90), mode="bilinear", align_corners=False)
    back = torch.nn.functional.interpolate(stretched, (64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(segmenter(stretched).logits, segmenter(back).logits)


def test_bytes_and_fractions_of_one_image_give_the_same_output() -> None:
    segmenter = build("test_resnet").eval()
    images = noise(64, 64)
    torch.testing.assert_close(segmenter(images), segmenter(images.float() / 255))


def test_images_are_normalised_as_the_backbones_weights_expect() -> None:
    segmenter = build("resnet18")
    received = []
    segmenter.backbone.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    segmenter(torch.full((2, 3, 64, 64), 255, dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(received[0].mean((0, 2, 3)), torch.tensor(expected))


def test_head_features_are_what_the_pyramids_classifier_reads() -> None:
    segmenter = build("test_resnet", association_features="head").eval()
    output = segmenter(noise(64, 64))
    torch.testing.assert_close(segmenter.head.classifier(output.features), output.logits)


def test_deeplabs_classifier_reads_the_deepest_map() -> None:
    backbone, head = (
        build("test_resnet", output_stride=8, head="deeplab_v2", association_features=which).eval()
        for which in ("backbone", "head")
    )
    torch.testing.assert_close(head(noise(64, 64)).features, backbone(noise(64, 64)).features)


def test_backbone_and_head_hold_every_parameter_between_them() -> None:
    segmenter = build("test_resnet")
    parts = [*segmenter.backbone.parameters(), *segmenter.head.parameters()]
    assert {id(parameter) for parameter in parts} == {id(parameter) for parameter in segmenter.parameters()}


def test_saved_weights_carry_their_normalisation() -> None:
    state = build("test_resnet").state_dict()
    other = build("test_resnet")
    other.mean.zero_()
    other.load_state_dict(state)
    torch.testing.assert_close(other.mean.flatten(), torch.tensor([0.5, 0.5, 0.5]))


@pytest.mark.parametrize(
    ("backbone", "output_stride", "own"),
    [("test_vit", 8, 16), ("swin_tiny_patch4_window7_224", 8, 32), ("resnet18", 4, 32)],
)
def test_an_output_stride_that_the_family_cannot_have_is_refused_with_its_own(
    backbone: str, output_stride: int, own: int
) -> None:
    message = (
        rf"^model\.output_stride: {backbone} cannot have {output_stride}; its own stride is {own}, which null takes"
    )
    with pytest.raises(UserError, match=message):
        build(backbone, output_stride=output_stride)


def test_an_unknown_backbone_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"^model\.backbone: .*'resnet_101'; the nearest are .*resnet101"):
        build("resnet_101")


@pytest.mark.parametrize("output_stride", [8, None])
def test_an_unknown_tag_of_weights_is_refused(output_stride: int | None) -> None:
    with pytest.raises(UserError, match=r"^model\.backbone: resnet18\.nowhere"):
        build("resnet18.nowhere", output_stride=output_stride)
