"""Shipped recipes of the large data sets: networks that timm has, batches that share out, terms that fit together."""

import pytest
import timm
import torch

from dist_pca.config import RunConfig, load_config
from dist_pca.data.source import micro_batch_size
from dist_pca.model.segmenter import build_segmenter
from dist_pca.resources import names, resource
from dist_pca.tools.planning.network import class_count, run_network
from dist_pca.training.optimizer import build_optimizer

RECIPES = [name for name in names("configs") if "_to_" in name]
# One of those that differ in nothing but their data.
NETWORKS = list({load_config(resource("configs", name)).model.model_dump_json(): name for name in RECIPES}.values())
TODAYS = [name for name in RECIPES if not name.endswith("_paper")]


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(resource("configs", name), ["model.weights=scratch", *overrides])


def test_recipes_are_named_after_their_runs() -> None:
    assert len(RECIPES) > len(TODAYS) > 0
    for name in RECIPES:
        assert load_config(resource("configs", name)).name == name


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_has_the_network_with_weights_and_it_reads_crops_that_fit_it(name: str) -> None:
    config = recipe(name)
    assert load_config(resource("configs", name)).model.weights == "hub"
    assert timm.models.is_model_pretrained(config.model.backbone)
    with torch.device("meta"):
        network = build_segmenter(config.model, class_count(config) or 19).eval()
        output = network(torch.empty(1, 3, 64, 128))
    assert output.logits.shape[:2] == (1, class_count(config) or 19)
    assert output.features.ndim == 4
    # Crops of these sizes are not resized to fit patches or windows.
    assert all(edge % network.backbone.multiple == 0 for edge in config.data.crop)
    build_optimizer(config.optimizer, network)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_batches_share_out_over_a_machine(name: str, gpus: int) -> None:
    for key, batch in recipe(name).batches.items():
        assert micro_batch_size(batch, world_size=gpus, accumulation=1, key=key) == batch // gpus


@pytest.mark.parametrize("name", TODAYS)
def test_todays_recipes_have_the_published_settings(name: str) -> None:
    config = recipe(name)
    objective, schedule = config.objective, config.schedule
    assert (objective.self_training.weight, objective.self_training.threshold) == (1, 0.968)
    assert (objective.masked_consistency.weight, objective.masked_consistency.ratio) == (1, 0.7)
    assert objective.masked_consistency.block == config.data.crop[0] // 16
    assert (config.training.ema_decay, config.training.steps) == (0.999, 40_000)
    assert (schedule.name, schedule.power, schedule.warmup_steps, schedule.horizon) == ("poly", 1, 1500, None)
    assert (config.optimizer.name, config.optimizer.head_multiplier) == ("adamw", 10)
    assert config.data.sampling.source == "rare_class"
    association = objective.association
    assert association.start_step == association.ramp_steps == config.training.steps // 10
    assert association.teacher_check
    assert association.teacher_weight
    assert association.class_balanced
    # Ignored rows are those of whole images only where a crop is as high as they are.
    if objective.self_training.ignore_bottom > 0:
        assert config.data.shorter_edge == (config.data.crop[0], config.data.crop[0])


def test_what_uses_dinov3_names_its_licence() -> None:
    for name in RECIPES:
        text = resource("configs", name).read_text()
        assert ("dinov3" in recipe(name).model.backbone) == ("DINOv3 License" in text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [NETWORKS[0], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in NETWORKS[1:])]
)
def test_its_step_can_be_planned(name: str) -> None:
    config = recipe(name, "data.crop=[64,64]")
    step = run_network(config, class_count(config) or 19, 1, 1)
    assert step.parameters > 2e7
    assert (step.frozen_bytes > 0) == (config.objective.feature_distance.weight > 0)
