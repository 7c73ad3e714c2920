from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_pca.errors import UserError
from dist_pca.evaluation import onnx_file
from dist_pca.evaluation.export import export
from dist_pca.evaluation.onnx_file import require_onnx, write_onnx
from dist_pca.model.exported import load_exported
from tests.support.networks import CLASSES, run_config, segmenter

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs the extra `export`"
)


@pytest.mark.parametrize(("size", "edge"), [(None, 24), ((32, 64), 32)])
def test_an_export_says_at_which_size_images_are_shown(tmp_path: Path, size: tuple[int, int] | None, edge: int) -> None:
    assert export(segmenter(), run_config(input_size=size), CLASSES, tmp_path / "out") is None
    found = load_exported(tmp_path / "out")
    assert found[1:] == (CLASSES, size, edge)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classes.json",
        "config.json",
        "model.safetensors",
    ]


@needs_onnx
@pytest.mark.parametrize("bands", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_graph_of_one_size_gives_the_networks_logits_at_the_images_resolution(tmp_path: Path, bands: int) -> None:
    import onnxruntime

    model = segmenter(bands=bands)
    assert write_onnx(model, tmp_path / "model.onnx", (48, 64)) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.randint(0, 256, (3, bands, 48, 64), dtype=torch.uint8)
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        small = model(images).logits
    expected = torch.nn.functional.interpolate(small, (48, 64), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {},
        *(
            pytest.param(keys, marks=pytest.mark.exhaustive)
            for keys in (
                {"head": "deeplab_v2", "output_stride": 8},
                {"backbone": "test_vit"},
                {"head": "daformer", "association_features": "projection", "association_stride": 8},
                {"head": "mlp", "association_stride": 16},
            )
        ),
    ],
)
def test_a_graph_takes_images_of_any_size(tmp_path: Path, keys: dict[str, Any]) -> None:
    import onnxruntime

    model = segmenter(**({"output_stride": None} | keys))
    write_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    # 80 and 48 are halfway between multiples of 32, and 40 and 24 between those of 16.
    for height, width in ((80, 48), (33, 130), (40, 24), (240, 64)):
        images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            small = model(images).logits
        expected = torch.nn.functional.interpolate(small, (height, width), mode="bilinear", align_corners=False)
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


@needs_onnx
def test_a_graph_that_gives_other_logits_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward: Callable[..., torch.Tensor] = onnx_file._Graph.forward

    def unlike_in_training(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        logits = forward(self, images)
        return logits if torch.compiler.is_exporting() else 1.01 * logits

    monkeypatch.setattr(onnx_file._Graph, "forward", unlike_in_training)
    with pytest.raises(UserError, match=r"^--onnx: the graph's logits differ from PyTorch's by 9\.9e-03"):
        export(segmenter(), run_config(), CLASSES, tmp_path / "out", onnx=True, onnx_size=(32, 32))
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_a_network_that_cannot_be_traced_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def by_content(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return images.float() if images.sum() > 3 else -images.float()

    monkeypatch.setattr(onnx_file._Graph, "forward", by_content)
    with pytest.raises(UserError, match=r"^--onnx: PyTorch cannot trace this network .*fix its size with --onnx-size"):
        export(segmenter(), run_config(), CLASSES, tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--onnx: onnx, onnxscript, onnxruntime not installed; pip install 'dist-pca"):
        require_onnx()
