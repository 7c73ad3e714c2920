import pytest
import torch
from torch.nn import functional as F

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
        ("test_resnet", 8, (10, 12), (19, 23)),
        ("test_efficientnet", 8, (10, 12), (19, 23)),
        ("tf_efficientnet_lite0", None, (2, 3), (16, 24)),
        ("test_convnext", 8, (9, 11), (18, 22)),
        ("test_convnext", None, (2, 3), (16, 24)),
        ("swin_tiny_patch4_window7_224", None, (2, 3), (16, 24)),
        ("test_vit", 16, (5, 6), (20, 24)),
        ("vit_small_patch14_dinov2", None, (5, 6), (20, 24)),
        ("vit_small_patch16_dinov3", None, (5, 6), (20, 24)),
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


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("head", ["pyramid", "daformer", "mlp"])
def test_every_head_and_projection_train_on_small_crops(backbone: str, head: str) -> None:
    segmenter = build(backbone, head=head, association_features="projection", association_stride=8)
    images = noise(112, 176)
    logits, features, _ = segmenter(images)
    assert logits.shape[-1] in (44, 48)
    assert features.shape == (2, 256, logits.shape[-2] // 2, logits.shape[-1] // 2)
    optimizer = torch.optim.SGD(segmenter.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        logits, features, _ = segmenter(images)
        losses.append(logits.logsumexp(1).mean() + features.square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        assert [name for name, parameter in segmenter.named_parameters() if parameter.grad is None] == []
        optimizer.step()
    assert losses[1] < losses[0]


def fences() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of poles 3 pixels wide and 7 apart, and which pixels they cover."""
    labels = torch.stack([(torch.arange(64) + shift) % 10 < 3 for shift in range(4)])[:, None, :].expand(-1, 48, -1)
    dirt = torch.randint(0, 40, (4, 3, 48, 64), generator=torch.Generator().manual_seed(0))
    return (labels[:, None] * 120 + 60 + dirt).to(torch.uint8), labels.long()


def test_poles_of_three_pixels_are_drawn_at_stride_four_and_not_at_eight() -> None:
    images, labels = fences()
    overlap = {}
    for stride in (4, 8):
        segmenter = build("test_resnet", head_channels=32, head_stride=stride)
        optimizer = torch.optim.AdamW(segmenter.parameters(), lr=5e-3)
        for _ in range(50):
            logits = F.interpolate(segmenter(images).logits, (48, 64), mode="bilinear", align_corners=False)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
        drawn = logits.argmax(1)
        overlap[stride] = ((drawn == 1) & (labels == 1)).sum() / ((drawn == 1) | (labels == 1)).sum()
    assert overlap[4] > 0.6
    assert overlap[8] < 0.3


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize(
    ("backbone", "keys"),
    [
        ("test_resnet", {"association_features": "backbone", "output_stride": 16}),
        ("test_resnet", {"association_features": "head"}),
        ("test_resnet", {"association_features": "head", "head": "deeplab_v2", "output_stride": 8}),
        ("test_resnet", {"association_features": "projection"}),
        ("test_vit", {"association_features": "head", "head_stride": 8}),
    ],
)
def test_association_features_are_on_the_grid_asked_for(backbone: str, keys: dict[str, object], stride: int) -> None:
    own, asked = (build(backbone, association_stride=value, **keys)(noise(128, 192)) for value in (None, stride))
    assert asked.features.shape[-2:] == (128 // stride, 192 // stride)
    assert asked.logits.shape == own.logits.shape


def test_a_grid_of_patches_of_fourteen_pixels_covers_the_image() -> None:
    segmenter = build("test_vit")
    segmenter.feature_stride, segmenter.association_stride = 14, 8
    assert segmenter(noise(112, 176)).features.shape[-2:] == (13, 20)


def test_coarser_features_are_means_and_finer_ones_are_interpolated() -> None:
    own, coarser, finer = (
        build("test_resnet", output_stride=16, association_stride=stride).eval()(noise(64, 96)).features
        for stride in (None, 32, 8)
    )
    torch.testing.assert_close(coarser, F.avg_pool2d(own, 2))
    torch.testing.assert_close(finer, F.interpolate(own, scale_factor=2, mode="bilinear", align_corners=False))


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


@pytest.mark.parametrize(
    ("bands", "mean", "std"),
    [
        (1, [(0.485 + 0.456 + 0.406) / 3], [(0.229 + 0.224 + 0.225) / 3]),
        (5, [0.485, 0.456, 0.406, 0.485, 0.456], [0.229, 0.224, 0.225, 0.229, 0.224]),
    ],
)
def test_other_bands_are_normalised_as_rgb_in_turn_and_one_as_its_mean(
    bands: int, mean: list[float], std: list[float]
) -> None:
    segmenter = build("resnet18", bands=bands)
    torch.testing.assert_close(segmenter.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(segmenter.std.flatten(), torch.tensor(std))


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224"])
def test_every_family_takes_other_bands(backbone: str) -> None:
    segmenter = build(backbone, bands=4)
    images = noise(64, 96)[:, [0, 1, 2, 0]]
    images[:, 3] //= 2
    changed = images.clone()
    changed[:, 3] = 0
    with torch.no_grad():
        first, second = segmenter.eval()(images).logits, segmenter(changed).logits
    assert not torch.equal(first, second)


def test_head_features_are_what_the_pyramids_classifier_reads() -> None:
    segmenter = build("test_resnet", association_features="head").eval()
    output = segmenter(noise(64, 64))
    torch.testing.assert_close(segmenter.head.get_submodule("classifier")(output.features), output.logits)


def test_deeplabs_classifier_reads_the_deepest_map() -> None:
    backbone, head = (
        build("test_resnet", output_stride=8, head="deeplab_v2", association_features=which).eval()
        for which in ("backbone", "head")
    )
    torch.testing.assert_close(head(noise(64, 64)).features, backbone(noise(64, 64)).features)


def test_backbone_head_and_projection_hold_every_parameter_between_them() -> None:
    segmenter = build("test_resnet", association_features="projection")
    modules = (segmenter.backbone, segmenter.head, segmenter.projection)
    parts = [parameter for module in modules if module is not None for parameter in module.parameters()]
    assert {id(parameter) for parameter in parts} == {id(parameter) for parameter in segmenter.parameters()}


@pytest.mark.parametrize("features", ["backbone", "head"])
def test_there_is_no_projection_that_nothing_reads(features: str) -> None:
    assert build("test_resnet", association_features=features).projection is None


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


def test_stochastic_depth_drops_in_training_alone_and_is_refused_where_timm_has_none() -> None:
    torch.manual_seed(0)
    values = {"weights": "scratch", "output_stride": None, "head": "pyramid", "drop_path": 0.5}
    segmenter = build_segmenter(ModelConfig.model_validate({"backbone": "test_vit", **values}), 5)
    images = noise(64, 64)
    assert not torch.equal(segmenter(images).logits, segmenter(images).logits)
    segmenter.eval()
    assert torch.equal(segmenter(images).logits, segmenter(images).logits)
    with torch.device("meta"), pytest.raises(UserError, match=r"model\.drop_path: timm's vgg11 takes none"):
        build_segmenter(ModelConfig.model_validate({"backbone": "vgg11", **values}), 5)
