"""Export of a run's network."""

from collections.abc import Sequence
from pathlib import Path

from dist_pca.classes import ClassInfo
from dist_pca.config import RunConfig
from dist_pca.evaluation.onnx_file import write_onnx
from dist_pca.files import new_folder
from dist_pca.model.exported import save_exported
from dist_pca.model.segmenter import Segmenter


def export(
    model: Segmenter,
    config: RunConfig,
    classes: Sequence[ClassInfo],
    out: Path,
    *,
    onnx: bool = False,
    onnx_size: tuple[int, int] | None = None,
) -> float | None:
    """Write a network into a folder for `dist_pca.model.exported.load_exported`, atomically.

    Args:
        model: The network, on the CPU, in evaluation mode.
        config: The run.
        classes: Classes by train id.
        out: The folder to create.
        onnx: Add `model.onnx`.
        onnx_size: Fixed height and width of its input; None for any.

    Returns:
        Largest difference between the logits of ONNX and PyTorch, relative to the largest logit; None without ONNX.

    Raises:
        UserError: the folder is not empty or cannot be written, or the network cannot be exported to ONNX with equal
            logits.
    """
    size = config.evaluation.input_size
    with new_folder(out, "--out") as staged:
        edge = round(sum(config.data.shorter_edge) / 2) if size is None else min(size)
        save_exported(staged, model, config.model, classes, input_size=size, shorter_edge=edge)
        return write_onnx(model, staged / "model.onnx", onnx_size) if onnx else None
