"""Supervised contrastive loss on source pixels.

Khosla et al., NeurIPS 2020, on pixels of all images of an update as in Wang et al., ICCV 2021. On a projection and
together with self-training it is the pixel-wise term of PiPa (Chen et al., ACM MM 2023).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_pca.distributed import all_gather, world_size
from dist_pca.objective.reduction import world_mean

IGNORE_INDEX = 255


def source_contrast(
    features: torch.Tensor, labels: torch.Tensor, seeds: Sequence[int], *, temperature: float, anchors: int
) -> torch.Tensor:
    """InfoNCE of sampled source pixels, a limited number per class (Wang et al. 2021, equation 3). Collective.

    `-(1 / |P_i|) sum_{p in P_i} log(exp(s_ip / t) / (exp(s_ip / t) + sum_{n in N_i} exp(s_in / t)))`, averaged over
    anchors i; s is the cosine similarity, P_i are the other pixels of i's class, N_i those of other classes. Anchors
    for which either set is empty are left out. The same pixels are anchors and candidates, so the logits are at most
    [K anchors, K anchors], independent of the crop size. At any world size the same pixels are sampled, and each is
    compared with those of all ranks.

    Args:
        features: [B, C, h, w].
        labels: int64 [B, h * w], 255 for pixels that are left out.
        seeds: B seeds, one per crop; a pixel's random priority is a function of its crop's seed and its index there.
        temperature: Temperature t, above 0.
        anchors: Largest number of sampled pixels per class, over the images of all ranks.

    Returns:
        Scalar, scaled so that the average of gradients over ranks is the gradient of the mean over all ranks' anchors;
        0, with a graph, if there are none.
    """
    device, (count, pixels) = labels.device, labels.shape
    turns = torch.empty(count, pixels, dtype=torch.int64)
    for turn, seed in zip(turns, seeds, strict=True):
        torch.randint(2**62, (pixels,), generator=torch.Generator().manual_seed(seed), out=turn)
    flat_labels, flat_turns = labels.flatten(), turns.flatten().to(device)
    # A pixel that is not among its rank's first `anchors` of a class cannot be among the first of all ranks.
    own = (flat_labels != IGNORE_INDEX).nonzero()[:, 0]
    own = own[_first_of_each(flat_labels[own], flat_turns[own], anchors)]
    classes, class_turns = all_gather(torch.stack([flat_labels[own], flat_turns[own]], dim=1)).unbind(dim=1)
    drawn = _first_of_each(classes, class_turns, anchors)
    before = _rows_before(own)
    own = own[drawn[before : before + len(own)]]

    queries = F.normalize(features.flatten(2).mT.flatten(0, 1)[own], dim=1)
    keys, key_classes = all_gather(queries), classes[drawn]
    # s_ij / t
    logits = queries @ keys.T / temperature
    same = flat_labels[own][:, None] == key_classes
    positive = same.clone()
    rows = torch.arange(len(own), device=device)
    positive[rows, drawn[:before].sum() + rows] = False
    counted = positive.any(dim=1) & ~same.all(dim=1)
    logits, same, positive = logits[counted], same[counted], positive[counted]
    # ln sum_{n in N_i} exp(s_in / t)
    negatives = logits.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    # -ln(e^a / (e^a + e^b)) = softplus(b - a)
    losses = F.softplus(negatives - logits)
    means = (losses * positive).sum(dim=1) / positive.sum(dim=1)
    return world_mean(means.sum(), counted.sum())


def _first_of_each(classes: torch.Tensor, turns: torch.Tensor, count: int) -> torch.Tensor:
    """Whether each of n pixels is among the first `count` of its class, ordered by `turns`, bool [n]."""
    order = turns.argsort()
    order = order[classes[order].argsort(stable=True)]
    sizes = torch.bincount(classes, minlength=1)
    # Rank within the class: index in the sorted order minus the number of pixels of all earlier classes.
    places = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[classes[order]]
    first = torch.empty_like(order, dtype=torch.bool)
    first[order] = places < count
    return first


def _rows_before(own: torch.Tensor) -> int:
    """Number of rows of all lower ranks; each rank has as many as its `own`. Collective."""
    if world_size() == 1:
        return 0
    counts = all_gather(torch.tensor([len(own)], device=own.device))
    return int(counts[: dist.get_rank()].sum())
