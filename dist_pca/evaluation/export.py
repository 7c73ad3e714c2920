"""A run's network without the run."""

from collections.abc import Sequence
from pathlib import Path

from dist_pca.config import RunConfig
from dist_pca.evaluation.onnx_file import write_onnx
from dist_pca.evaluation.staged import staged_folder
from dist_pca.model.exported import save_exported
from dist_pca.model.segmenter import Segmenter
from dist_pca.shards.classes import ClassInfo


def export(
    model: Segmenter,
    config: RunConfig,
    classes: Sequence[ClassInfo],
    out: Path,
    *,
    onnx: bool = False,
    onnx_size: tuple[int, int] | None = None,
) -> float | None:
    """Write a network into a folder that `dist_pca.model.exported.load_exported` reads; whole or not at all.

    Args:
        model: The network, on the CPU, in evaluation mode.
        config: The run.
        classes: Classes by train id.
        out: The folder to make.
        onnx: Add `model.onnx`.
        onnx_size: The only height and width that it takes; None for any.

    Returns:
        The largest difference of the ONNX file's logits to PyTorch's, in units of the largest; None without it.

    Raises:
        UserError: the folder is not empty or cannot be written, or the network has no ONNX graph with its logits.
    """
    size = config.evaluation.input_size
    with staged_folder(out, "--out") as staged:
        edge = round(sum(config.data.shorter_edge) / 2) if size is None else min(size)
        save_exported(staged, model, config.model, classes, input_size=size, shorter_edge=edge)
        return write_onnx(model, staged / "model.onnx", onnx_size) if onnx else None
