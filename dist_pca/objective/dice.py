"""Soft Dice loss (Milletari et al., "V-Net", 3DV 2016) over the pixels of all ranks."""

import torch

from dist_pca.distributed import all_reduce_sum, world_size
from dist_pca.objective.domains import IGNORE_INDEX


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute 1 minus the mean over classes of `2 sum_i p_i g_i / (sum_i p_i^2 + sum_i g_i^2)`. Collective.

    p is the probability of the class and g is 1 where it is the label. Sums are over the labelled pixels of all ranks,
    and the mean is over classes that are the label of any.

    Args:
        logits: [B, K, H, W].
        labels: int64 [B, H, W], 255 for pixels that are left out.

    Returns:
        Scalar, scaled so that the average of gradients over ranks is the gradient of one process on all pixels; 0, with
        a graph, if no pixel is labelled.
    """
    labelled = labels != IGNORE_INDEX
    probabilities = logits.softmax(dim=1)
    overlaps, sizes, present = [], [], []
    for number, probability in enumerate(probabilities.unbind(dim=1)):
        member = labels == number
        overlaps.append((probability * member).sum())
        sizes.append((probability.square() * labelled).sum() + member.sum())
        present.append(member.sum())
    # [3, K]: sums over this rank's pixels, and then over all.
    own = torch.stack([torch.stack(overlaps), torch.stack(sizes), torch.stack(present).to(logits.dtype)])
    overlap, size, pixels = own + (all_reduce_sum(own) - own.detach())
    occurs = pixels > 0
    scores = torch.where(occurs, 2 * overlap / size.clamp(min=torch.finfo(size.dtype).tiny), 0)
    loss = (occurs.sum() - scores.sum()) / occurs.sum().clamp(min=1)
    # Every rank has the loss of all pixels, but the gradient of its own ones alone.
    scaled: torch.Tensor = loss.detach() + world_size() * (loss - loss.detach())
    return scaled
