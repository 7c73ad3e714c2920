"""Whole small runs on a GPU: they compute what the same run computes on a CPU, and what they trained can be used."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_pca.model.exported import load_exported
from tests.gpu.runs import DEVICES, command, losses, train, use

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
KINDS = {
    "ZeRO 1": (1, (), 0.02),
    "ZeRO 3": (3, (), 0.02),
    "activation checkpointing": (2, ("model.activation_checkpointing=true",), 0.02),
    "optimiser on the CPU": (2, ("training.offload.optimizer=cpu",), 0.02),
    "parameters on the CPU": (3, ("training.offload.optimizer=cpu", "training.offload.parameters=cpu"), 0.02),
    "bf16": (2, ("training.precision=bf16",), 0.1),
}
"""ZeRO stage, keys, and by which share the loss may differ from that of fp32 at stage 2."""


@pytest.fixture(scope="module")
def on_cpu(streets: Path) -> list[float]:
    """Losses of the plain run on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        use("cpu", patch)
        return losses(train(streets, "on_cpu", "cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_has_the_losses_of_the_cpu_and_can_be_scored_used_and_exported(
    streets: Path, on_cpu: list[float], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        use(device, patch)
        lines = train(streets, f"plain_{device}", device)
        assert losses(lines) == pytest.approx(on_cpu, rel=0.02)
        assert lines[-1]["peak_memory_bytes"] > 0
        run = streets / "runs" / f"plain_{device}"
        images = streets / "raw" / "dusk" / "images"
        here = json.loads(command("evaluate", run, "--shards", streets / "dusk", "--json"))
        command("predict", run, images, "--out", tmp_path / "here")
        command("export", run, "--out", tmp_path / "exported")
    use("cpu", monkeypatch)
    there = json.loads(command("evaluate", run, "--shards", streets / "dusk", "--json"))
    assert here["images"] == there["images"] == 6
    assert here["mean_iou"] == pytest.approx(there["mean_iou"], abs=0.01)
    command("predict", run, images, "--out", tmp_path / "there")
    files = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here" / "labels").glob("*.png"))
    assert len(files) == 6
    for file in files:
        one, other = (np.asarray(Image.open(tmp_path / name / file)) for name in ("here", "there"))
        assert (one == other).mean() > 0.99
    network = load_exported(tmp_path / "exported").model
    pixels = torch.from_numpy(np.asarray(Image.open(sorted(images.glob("*.png"))[0])).copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = network(pixels).logits
        found = network.to(device)(pixels.to(device)).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_train_has_the_losses_of_the_plain_run(
    streets: Path, on_cpu: list[float], kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(device, monkeypatch)
    stage, keys, tolerance = KINDS[kind]
    name = f"{kind.lower().replace(' ', '_')}_{device}"
    assert losses(train(streets, name, device, *keys, stage=stage)) == pytest.approx(on_cpu, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_has_nearly_the_losses_of_fp32_under_a_scale_that_is_logged(
    streets: Path, on_cpu: list[float], stage: int
) -> None:
    lines = train(streets, f"fp16_{stage}", "cuda", "training.precision=fp16", stage=stage)
    assert losses(lines) == pytest.approx(on_cpu, rel=0.1)
    scales = [line["loss_scale"] for line in lines]
    assert all(scale > 1 for scale in scales)
    # It only ever halves in so few steps.
    assert scales == sorted(scales, reverse=True)
