"""Every trained parameter has one learning rate, by its group and the schedule, and one weight decay."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.config import ModelConfig, OptimizerConfig, load_config
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter, build_segmenter
from dist_pca.resources import resource
from dist_pca.training.optimizer import build_optimizer, learning_rate_factor

BACKBONES = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit2", "swin_tiny_patch4_window7_224")


def build(backbone: str = "test_resnet", **keys: object) -> Segmenter:
    values = {"weights": "scratch", "output_stride": None, "head": "pyramid", "head_channels": 8} | keys
    return build_segmenter(ModelConfig.model_validate({"backbone": backbone} | values), 3)


def settings_of(model: Segmenter, key: str, **options: object) -> dict[str, float]:
    """A key of the group of each of a model's parameters, by the parameter's name."""
    groups = build_optimizer(OptimizerConfig.model_validate(options), model).param_groups
    values = [(id(parameter), group[key]) for group in groups for parameter in group["params"]]
    assert len(dict(values)) == len(values)
    return {name: dict(values)[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def models() -> dict[str, Segmenter]:
    return {name: build(name, association_features="projection") for name in BACKBONES}


@settings(max_examples=12)
@given(
    backbone=st.sampled_from(BACKBONES),
    name=st.sampled_from(["sgd", "adamw"]),
    layer_decay=st.sampled_from([None, 0.5, 1.0]),
    frozen=st.booleans(),
)
def test_every_trained_parameter_is_in_exactly_one_group(
    models: dict[str, Segmenter], backbone: str, name: str, layer_decay: float | None, frozen: bool
) -> None:
    model = models[backbone]
    first, *others = model.parameters()
    first.requires_grad_(not frozen)
    config = OptimizerConfig.model_validate({"name": name, "layer_decay": layer_decay})
    groups = build_optimizer(config, model).param_groups
    first.requires_grad_(True)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(map(id, others if frozen else [first, *others]))


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("test_vit2", ["patch_embed.proj.weight", *(f"blocks.{block}.attn.qkv.weight" for block in range(8))]),
        (
            "convnext_atto",
            ["stem_0.weight", *(f"stages_{stage}.blocks.{block}.mlp.fc1.weight" for stage, block in ((0, 0), (0, 1)))],
        ),
        (
            "convnext_atto",
            [f"stages_{stage}.blocks.{block}.conv_dw.weight" for stage, block in ((1, 1), (2, 0), (2, 5), (3, 0))],
        ),
        ("test_resnet", ["conv1.0.weight", *(f"layer{layer}.0.conv1.weight" for layer in (1, 2, 3, 4))]),
    ],
)
def test_later_layers_learn_faster_up_to_the_rate_of_the_backbone(backbone: str, layers: list[str]) -> None:
    model = build(backbone)
    rates = settings_of(model, "lr", name="adamw", lr=0.1, layer_decay=0.5)
    names = {name.removeprefix("backbone.body.").removeprefix("model."): name for name in rates}
    own = [rates[names[layer]] for layer in layers]
    assert all(later >= 2 * earlier * (1 - 1e-6) for earlier, later in pairwise(own))
    assert max(rate for name, rate in rates.items() if name.startswith("backbone")) == pytest.approx(0.1)
    deepest = list(model.backbone.body.named_parameters())[-1][0]
    assert rates[f"backbone.body.{deepest}"] == pytest.approx(0.1)


def test_neighbouring_layers_differ_by_the_decay() -> None:
    rates = settings_of(build("test_vit2"), "lr", lr=1.0, layer_decay=0.9)
    blocks = sorted({rate for name, rate in rates.items() if ".blocks." in name})
    assert len(blocks) == 8
    assert [later * 0.9 for later in blocks[1:]] == pytest.approx(blocks[:-1])
    assert rates["backbone.body.model.pos_embed"] == pytest.approx(0.9 * blocks[0])


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_head_and_projection_learn_at_their_multiple_of_the_rate(layer_decay: float | None) -> None:
    model = build(association_features="projection")
    rates = settings_of(model, "lr", lr=0.1, head_multiplier=10.0, layer_decay=layer_decay)
    assert {rate for name, rate in rates.items() if not name.startswith("backbone.")} == {1.0}
    assert layer_decay or {rate for name, rate in rates.items() if name.startswith("backbone.")} == {0.1}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_adamw_decays_matrices_and_filters_alone(models: dict[str, Segmenter], backbone: str) -> None:
    model = models[backbone]
    decays = settings_of(model, "weight_decay", name="adamw", weight_decay=0.05)
    for name, parameter in model.named_parameters():
        position = any(part in name for part in ("pos_embed", "token", "relative_position_bias_table"))
        assert (decays[name] == 0.0) == (parameter.ndim <= 1 or position), name
    assert set(decays.values()) == {0.0, 0.05}


def test_sgd_decays_everything_in_one_group_for_backbone_and_one_for_head() -> None:
    groups = build_optimizer(OptimizerConfig(head_multiplier=10.0), build()).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(2.5e-4, 5e-4), (2.5e-3, 5e-4)]


def test_a_backbone_whose_layers_timm_does_not_know_is_refused_a_decay_over_them() -> None:
    model = build("pit_ti_224")
    build_optimizer(OptimizerConfig(name="adamw"), model)
    with pytest.raises(
        UserError, match=r"^optimizer\.layer_decay: timm does not know the layers of pit_ti_224; set it"
    ):
        build_optimizer(OptimizerConfig(name="adamw", layer_decay=0.9), model)


@pytest.mark.parametrize(("layer_decay", "groups"), [(None, 4), (0.9, 2 * (1 + 12 + 1))])
def test_there_are_two_groups_for_the_stem_each_of_twelve_blocks_and_the_head(
    layer_decay: float | None, groups: int
) -> None:
    config = OptimizerConfig(name="adamw", layer_decay=layer_decay)
    assert len(build_optimizer(config, build("convnext_atto")).param_groups) == groups


def test_building_groups_draws_no_random_number() -> None:
    model = build("test_vit2")
    before = torch.get_rng_state()
    build_optimizer(OptimizerConfig(name="adamw", layer_decay=0.9), model)
    assert torch.equal(torch.get_rng_state(), before)


def factor(step: int, *overrides: str) -> float:
    return learning_rate_factor(load_config(resource("configs", "gta5_to_cityscapes_paper"), overrides), step)


def test_poly_falls_to_zero_at_its_horizon_not_at_the_last_step() -> None:
    assert factor(0) == 1
    assert factor(5580) == pytest.approx(0.5**0.9)
    assert factor(10415) > 0
    assert factor(10415, "schedule.horizon=10416") == pytest.approx((1 / 10416) ** 0.9)


def test_a_least_factor_ends_the_fall_and_goes_beyond_the_horizon() -> None:
    kept = ("schedule.horizon=5000", "schedule.minimum=0.1", "training.steps=9000")
    assert factor(2500, *kept) == factor(2500, "schedule.horizon=5000", "training.steps=5000")
    assert factor(4999, *kept) == factor(5000, *kept) == factor(8999, *kept) == pytest.approx(0.1)


def test_warm_up_rises_linearly_and_ends_on_the_poly_curve() -> None:
    assert factor(0, "schedule.warmup_steps=10") == pytest.approx(0.1)
    assert factor(4, "schedule.warmup_steps=10", "schedule.name=constant") == pytest.approx(0.5)
    assert factor(10, "schedule.warmup_steps=10") == factor(10)


@pytest.mark.parametrize(("scaling", "expected"), [("none", 1), ("linear", 16), ("sqrt", 4)])
def test_the_rate_grows_with_the_batch_as_it_is_asked_to(scaling: str, expected: float) -> None:
    given = (f"schedule.batch_scaling={scaling}", "schedule.base_batch=8", "training.source_batch=128")
    assert factor(0, *given, "training.target_batch=128") == expected
    assert factor(0, *given, "training.target_batch=128", "schedule.warmup_steps=10") == pytest.approx(expected / 10)


def test_parts_of_the_backbone_have_learning_rates_of_their_own() -> None:
    model = build("test_resnet")
    multipliers = {"stem": 0.1, "layer1": 0.5, "layer1.0.conv1": 2.0}
    rates = settings_of(model, "lr", lr=1.0, backbone_multipliers=multipliers, head_multiplier=10.0)
    body = {name.removeprefix("backbone.body."): rate for name, rate in rates.items() if name.startswith("backbone.")}
    assert {body["conv1.0.weight"], body["bn1.bias"]} == {0.1}
    assert body["layer1.0.conv1.weight"] == 2.0
    assert body["layer1.0.conv2.weight"] == 0.5
    assert body["layer4.0.conv2.weight"] == 1.0
    assert rates["head.classifier.weight"] == 10.0
    decayed = settings_of(model, "lr", lr=1.0, backbone_multipliers={"layer3": 0.5}, layer_decay=0.1)
    plain = settings_of(model, "lr", lr=1.0, layer_decay=0.1)
    for name, rate in decayed.items():
        assert rate == pytest.approx(plain[name] * (0.5 if ".layer3." in name else 1.0))
    with pytest.raises(
        UserError, match=r"^optimizer\.backbone_multipliers: test_resnet has no part 'layr1'; .* layer1$"
    ):
        build_optimizer(OptimizerConfig(backbone_multipliers={"layr1": 1.0}), model)
