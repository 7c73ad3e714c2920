"""Export a segmenter to ONNX, and compare the result with PyTorch."""

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dist_pca.errors import UserError
from dist_pca.model.segmenter import Segmenter

OPSET = 18
TOLERANCE = 1e-3
"""Largest accepted difference of logits, relative to the largest logit."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED = (2, 128, 192)
"""Batch, height and width with which a graph for any size is traced; unequal, so that none is mistaken for another."""
_CHECKED = ((1, 160, 224), (2, 131, 97))
"""Batch, height and width of the comparison: other sizes, one of them not a multiple of any stride."""


class _Graph(nn.Module):
    """Wrapper from uint8 images to logits at the network's output stride."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.model(images).logits, images.shape[-2:], mode="bilinear", align_corners=False)


def require_onnx() -> None:
    """Check that the packages for ONNX export are installed.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: {', '.join(missing)} not installed; pip install 'dist-pca[export]'")


def write_onnx(model: Segmenter, path: Path, size: tuple[int, int] | None = None) -> float:
    """Write a segmenter as ONNX and run it: `images`, uint8 B x bands x H x W, to `logits`, float32 B x K x H x W.

    Normalisation is inside. The batch size is free.

    Args:
        model: The segmenter, on the CPU, in evaluation mode.
        path: The file.
        size: Fixed height and width of the input; None for any.

    Returns:
        Largest difference from PyTorch's logits on random images, relative to the largest logit.

    Raises:
        UserError: the network cannot be exported, or the exported graph gives other logits.
    """
    from torch.export import Dim

    graph = _Graph(model).eval()
    traced, bands = _TRACED if size is None else (2, *size), model.backbone.options.bands
    free = {0: Dim.DYNAMIC} if size is not None else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        # PyTorch prints whole graphs when tracing fails.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (_random_images(bands, *traced),),
                dynamo=True,
                dynamic_shapes={"images": free},
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        program.save(path, external_data=False)
    except RuntimeError as error:
        remedy = "fix its size with --onnx-size" if size is None else "leave out --onnx"
        raise UserError(
            f"--onnx: PyTorch cannot trace this network ({_reason(error)}); {remedy}, or choose another backbone"
        ) from error
    finally:
        logging.disable(level)
    shapes = _CHECKED if size is None else ((1, *size), (2, *size))
    difference = max(_difference(graph, path, _random_images(bands, *shape)) for shape in shapes)
    if not difference <= TOLERANCE:
        raise UserError(
            f"--onnx: the graph's logits differ from PyTorch's by {difference:.1e} of the largest, more than "
            f"{TOLERANCE:g}; leave out --onnx, or try another version of torch or onnxruntime"
        )
    return difference


def _difference(graph: nn.Module, path: Path, images: torch.Tensor) -> float:
    onnxruntime: Any = import_module("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(None, {"images": images.numpy()})[0]
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise UserError(f"--onnx: onnxruntime cannot run the graph ({_reason(error)}); leave out --onnx") from error
    with torch.no_grad():
        expected = graph(images).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _random_images(bands: int, batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, bands, height, width), dtype=torch.uint8, generator=torch.Generator())


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
