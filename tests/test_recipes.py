"""Shipped recipes of the large data sets: published settings, networks that timm has, batches that share out, steps."""

import json
import math
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from dist_pca.config import RunConfig, load_config
from dist_pca.data.decode import resize_range
from dist_pca.data.source import micro_batch_size
from dist_pca.data.stream import stream
from dist_pca.model.frozen import AUTOCAST, FrozenBackbone
from dist_pca.model.segmenter import Output, build_segmenter
from dist_pca.objective import objective
from dist_pca.resources import names, resource
from dist_pca.tools.planning.network import class_count, run_network
from dist_pca.training.optimizer import build_optimizer
from dist_pca.training.prepare import prepare_run
from dist_pca.training.views import forward_views, student_views
from tests.support.recipes import smallest, write_cityscapes

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
    objective, schedule, optimizer = config.objective, config.schedule, config.optimizer
    assert (objective.self_training.weight, objective.self_training.threshold) == (1, 0.968)
    assert (objective.masked_consistency.weight, objective.masked_consistency.ratio) == (1, 0.7)
    assert objective.masked_consistency.block == config.data.crop[0] // 16
    assert (objective.feature_distance.weight, objective.feature_distance.share) == (0.005, 0.75)
    contrast = objective.source_contrast
    assert (contrast.weight, contrast.temperature, contrast.anchors) == (0.1, 0.1, 100)
    assert (config.training.ema_decay, config.training.steps) == (0.999, 40_000)
    assert (schedule.name, schedule.power, schedule.warmup_steps, schedule.horizon) == ("poly", 1, 1500, None)
    assert (optimizer.name, optimizer.head_multiplier) == ("adamw", 10)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.01)
    # VFM-UDA scales the head's rate by the square root of the batch, and VFM-UDA++ has the layer decay; others are
    # DAFormer's.
    vfm = "_dinov3" in name
    assert optimizer.lr == pytest.approx(5e-6 * math.sqrt(8) if vfm else 6e-5, rel=0.02)
    assert optimizer.layer_decay == (0.9 if vfm else None)
    photometric = config.data.photometric
    strengths = photometric.brightness, photometric.contrast, photometric.saturation, photometric.hue
    assert strengths == ((0.8, 0.8, 0.8, 0.4) if vfm else (0.2, 0.2, 0.2, 0.2))
    assert (photometric.probability, photometric.blur_probability) == (0.8, 0.5)
    assert (photometric.blur_sigma, photometric.grey_probability) == (((0.15, 3.0), 0.1) if vfm else ((0.15, 1.15), 0))


@pytest.mark.parametrize("name", TODAYS)
def test_todays_recipes_show_images_of_the_published_sizes_and_ignore_the_published_margins(name: str) -> None:
    data, self_training = recipe(name).data, recipe(name).objective.self_training
    crop, sampling = data.crop[0], data.sampling
    vfm, mic = "_dinov3" in name, name.endswith("_mic")
    assert (sampling.source, sampling.temperature, sampling.min_pixels) == ("rare_class", 0.05 if vfm else 0.01, 3000)
    assert (sampling.min_crop_pixels, sampling.crop_attempts) == (6000 if vfm or mic else 1500, 20 if vfm else 10)
    source = {
        ("gta5", False): (1407, 1407) if mic else (704, 704),
        ("gta5", True): (1296, 1584),
        ("synthia", False): (1520, 1520) if mic else (760, 760),
        ("synthia", True): (1024, 1126),
        ("cityscapes", False): (512, 512),
    }[name.split("_")[0], vfm]
    assert resize_range(data, "source") == source
    if name == "cityscapes_to_acdc":
        assert resize_range(data, "target") == (540, 540)
        assert (self_training.ignore_top, self_training.ignore_bottom, self_training.ignore_sides) == (0, 0, 0)
        return
    # Ignored rows are those of whole images only where a crop is as high as they are.
    assert resize_range(data, "target") == (crop, crop)
    ignored = round(self_training.ignore_top * crop), round(self_training.ignore_bottom * crop)
    assert ignored == ((31, 256) if vfm else (30, 240) if mic else (15, 120))
    assert round(self_training.ignore_sides * 2 * crop) == (61 if vfm else 30 if mic else 0)


@pytest.mark.parametrize("name", TODAYS)
def test_todays_recipes_associate_as_has_been_measured(name: str) -> None:
    config, measured = recipe(name), load_config(resource("configs", "camvid"))
    association = config.objective.association
    for run in (config, measured):
        own = run.objective.association
        assert (own.start_step, own.ramp_steps) == (run.training.steps // 2, run.training.steps // 10)
    timing = {"start_step": 0, "ramp_steps": 0}
    assert association.model_copy(update=timing) == measured.objective.association.model_copy(update=timing)
    if config.model.backbone.startswith("resnet"):
        # The only backbones of the recipes with batch norm.
        assert (config.model.joint_batch, config.model.running_statistics) == (False, "target")


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


def parts(name: str) -> set[str]:
    """Terms of the loss that a recipe has beside cross-entropy."""
    objective = recipe(name).objective
    weights = {part: getattr(getattr(objective, part), "weight", 0) for part in type(objective).model_fields}
    return {part for part, weight in weights.items() if weight > 0}


@pytest.mark.parametrize("name", ["gta5_to_cityscapes", "gta5_to_cityscapes_dinov3_convnext"])
def test_its_smallest_network_takes_two_steps(name: str, tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    config = recipe(name, *smallest(tmp_path, recipe(name)))
    run = prepare_run(config, world_size=1, resume=None)
    model, low = run.model.train(), AUTOCAST[config.training.precision]
    pretrained = FrozenBackbone(model, autocast=low)
    optimizer = build_optimizer(config.optimizer, model)

    def network(images: torch.Tensor) -> Output:
        with torch.autocast("cpu", low, enabled=low is not None):
            output: Output = model(images)
        return output

    read = partial(stream, config.data, seed=0, rank=0, world_size=1, global_batch=2, accumulation=1, start_step=0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with (
        closing(read(run.sources, "source")) as sources,
        closing(read(run.targets, "target")) as targets,
    ):
        for step in range(2):
            source, target = next(sources), next(targets)
            # The student is its own teacher.
            views = student_views(
                config, source, target, network, torch.no_grad, pretrained, mean=model.mean, step=step
            )
            assert None not in views
            domains = forward_views(network, views, joint=config.model.joint_batch)
            loss, terms = objective(config.objective, *domains, step=step, things=run.things)
            assert loss.isfinite()
            assert all(any(term.startswith(part) for term in terms) for part in parts(name))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in NETWORKS else pytest.mark.exhaustive) for name in TODAYS]
)
def test_a_run_of_its_smallest_network_takes_two_steps(name: str, tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    command = [sys.executable, "-m", "dist_pca.train", name, *smallest(tmp_path, recipe(name))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert math.isfinite(line["loss"])
        assert line["skipped_share"] == 0
        assert all(any(term.startswith(part) for term in line) for part in parts(name))
    assert (run / "checkpoints" / "step-00000002" / "ema.safetensors").is_file()
