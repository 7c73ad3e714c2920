"""Shards in Cityscapes' classes for the large recipes, and their smallest runs on them."""

from pathlib import Path

import numpy as np

from dist_pca.classes import CITYSCAPES_CLASSES
from dist_pca.config import RunConfig
from tests.support.shards import png, write_shards

SIZE = (64, 96)
SMALLEST = {
    "resnet101": "resnet18",
    "pvt_v2_b5": "pvt_v2_b0",
    "vit_large_patch16_dinov3": "vit_tiny_patch16_dinov3_qkvb",
    "convnext_base": "convnext_atto",
}
"""Smallest network of timm by that of the same family which a recipe names, without its weights' name."""


def write_cityscapes(folder: Path) -> None:
    """Shards `source`, with labels, and `target`, without, of a few images whose classes are squares of 32 pixels."""
    generator = np.random.default_rng(0)
    for name in ("source", "target"):
        samples = []
        for _ in range(4):
            ids = generator.integers(0, len(CITYSCAPES_CLASSES), (SIZE[0] // 32, SIZE[1] // 32), dtype=np.uint8)
            label = ids.repeat(32, axis=0).repeat(32, axis=1)
            noise = generator.integers(0, 64, (*SIZE, 3), dtype=np.uint8)
            members = {"png": png(noise + 10 * label[..., None])}
            samples.append(members | ({"label.png": png(label)} if name == "source" else {}))
        labelled = name == "source"
        write_shards(folder / name, [samples], labelled=labelled, classes=CITYSCAPES_CLASSES, size=SIZE)


def smallest(folder: Path, config: RunConfig) -> list[str]:
    """Overrides that train a recipe for two steps on small crops, with all its terms from the first step."""
    backbone = SMALLEST[config.model.backbone.split(".")[0]]
    return [
        *(f"output={folder}/runs", f"data.source={folder}/source", f"data.target={folder}/target", "data.workers=0"),
        *("data.crop=[64,64]", "data.shorter_edge=[64,64]", "data.source_shorter_edge=[64,80]"),
        *("data.sampling.min_pixels=1", "data.sampling.min_crop_pixels=100"),
        *(f"model.backbone={backbone}", "model.weights=scratch"),
        # A random network is never as sure as the recipe wants it.
        *("objective.self_training.threshold=0.01", "objective.masked_consistency.block=16"),
        *("objective.association.start_step=0", "objective.association.ramp_steps=0", "schedule.warmup_steps=0"),
        *("training.steps=2", "training.source_batch=2", "training.target_batch=2", "training.log_every=1"),
        "telemetry.report=false",
    ]
