"""Supervised contrastive loss on source pixels.

Khosla et al., NeurIPS 2020, on pixels of all images of an update as in Wang et al., ICCV 2021. On a projection and
together with self-training it is the pixel-wise term of PiPa (Chen et al., ACM MM 2023).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_pca.distributed import all_gather, all_reduce_sum, sum_over_ranks, world_size
from dist_pca.objective.reduction import world_mean

IGNORE_INDEX = 255
_TURNS, _DIGITS = 2**62, 256
"""Number of a pixel's possible random priorities, its turns, and of values of the digit that is sought at a time."""


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
        torch.randint(_TURNS, (pixels,), generator=torch.Generator().manual_seed(seed), out=turn)
    flat_labels, flat_turns = labels.flatten(), turns.flatten().to(device)
    # A pixel that is not among its rank's first `anchors` of a class cannot be among the first of all ranks.
    own = (flat_labels != IGNORE_INDEX).nonzero()[:, 0]
    own = own[_first_of_each(flat_labels[own], flat_turns[own], anchors)]
    num_classes = _class_count(flat_labels[own])
    if world_size() > 1:
        last = last_turns(flat_labels[own], flat_turns[own], num_classes, anchors)
        own = own[flat_turns[own] <= last[flat_labels[own]]]

    queries = F.normalize(features.flatten(2).mT.flatten(0, 1)[own], dim=1)
    places, key_classes = _places(flat_labels[own], num_classes)
    # Every rank puts its rows into their places, and zeros elsewhere.
    keys = sum_over_ranks(queries.new_zeros(len(key_classes), queries.shape[1]).index_copy(0, places, queries))
    # s_ij / t
    logits = queries @ keys.T / temperature
    same = flat_labels[own][:, None] == key_classes
    positive = same.clone()
    positive[torch.arange(len(own), device=device), places] = False
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


def _class_count(classes: torch.Tensor) -> int:
    """Largest class of all ranks, and one more. Collective."""
    largest = classes.max() if len(classes) else classes.new_zeros(())
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest) + 1


def last_turns(classes: torch.Tensor, turns: torch.Tensor, num_classes: int, count: int) -> torch.Tensor:
    """Turn of the last of the first `count` pixels of each class over all ranks, int64 [K]. Collective.

    Its digits are found from the highest to the lowest, by how many pixels of all ranks have each, so that no rank
    needs the others' turns. Of a class with fewer pixels it is the largest turn there is.
    """
    last = torch.zeros(num_classes, dtype=torch.int64, device=classes.device)
    wanted = torch.full_like(last, count)
    bits = _DIGITS.bit_length() - 1
    for shift in range(_TURNS.bit_length() // bits * bits, -1, -bits):
        # Pixels that have the digits found so far. No turn has a sign, so that none is left of the highest digit.
        alike = turns >> min(shift + bits, 63) == (last >> min(shift + bits, 63))[classes]
        cells = classes[alike] * _DIGITS + (turns[alike] >> shift) % _DIGITS
        up_to = all_reduce_sum(torch.bincount(cells, minlength=num_classes * _DIGITS)).view(-1, _DIGITS).cumsum(dim=1)
        digit = (up_to < wanted[:, None]).sum(dim=1).clamp(max=(_TURNS - 1 >> shift) % _DIGITS)
        wanted -= F.pad(up_to, (1, 0)).gather(1, digit[:, None])[:, 0]
        last += digit << shift
    return last


def _places(classes: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of n rows among those of all ranks, int64 [n], and the classes there, in rising order. Collective."""
    own = torch.bincount(classes, minlength=num_classes)
    counts = all_gather(own[None])
    totals = counts.sum(dim=0)
    before = counts[: dist.get_rank() if world_size() > 1 else 0].sum(dim=0)
    order = classes.argsort(stable=True)
    within = torch.arange(len(classes), device=classes.device) - (own.cumsum(0) - own)[classes[order]]
    places = torch.empty_like(classes)
    places[order] = (totals.cumsum(0) - totals + before)[classes[order]] + within
    return places, torch.arange(num_classes, device=classes.device).repeat_interleave(totals)
