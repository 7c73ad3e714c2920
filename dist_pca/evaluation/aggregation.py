"""Test-time aggregation: gradient diffusion, which training applies to the target, before the prediction.

The features of each pixel are mixed with the similarity-weighted mean over their image. The classifier is applied to
the result, and its class probabilities are mixed in the same way (PLCA, section 3.2).
"""

from typing import Any, cast

import torch
from torch import nn

from dist_pca.association import diffuse
from dist_pca.association.method import LOG_EPSILON
from dist_pca.association.options import Similarity
from dist_pca.model.heads import MultiScaleHead
from dist_pca.model.segmenter import Segmenter


def aggregated_logits(model: nn.Module, images: torch.Tensor, share: float) -> torch.Tensor:
    """Log-probabilities of a segmenter after test-time aggregation, float32, B x K x h x w.

    Args:
        model: A `Segmenter`, in evaluation mode, on the images' device.
        images: floating point in 0..1, B x bands x H x W.
        share: Share of each pixel that is replaced by the mean, 0 to 1.
    """
    network = cast(Segmenter, model)

    def mix(_: nn.Module, inputs: tuple[Any]) -> tuple[Any]:
        (read,) = inputs
        if isinstance(read, torch.Tensor):
            return (_mixed(read, share, "cosine"),)
        *finer, deepest = read
        return ([*finer, _mixed(deepest, share, "cosine")],)

    by_classifier = network.association_features == "head" and isinstance(network.head, MultiScaleHead)
    reader: nn.Module = network.head.classifier if by_classifier else network.head  # type: ignore[assignment]
    hook = reader.register_forward_pre_hook(mix)
    try:
        logits = network(images).logits
    finally:
        hook.remove()
    return torch.log(_mixed(logits.float().softmax(dim=1), share, "kl") + LOG_EPSILON)


def _mixed(values: torch.Tensor, share: float, similarity: Similarity) -> torch.Tensor:
    rows = values.flatten(2).mT.contiguous()
    return diffuse(rows, share, similarity).mT.reshape(values.shape).to(values.dtype)
