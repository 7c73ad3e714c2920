"""Lovasz-Softmax (Berman, Rannen Triki and Blaschko, CVPR 2018): a convex surrogate of the mean IoU."""

import torch
import torch.distributed as dist

from dist_pca.association.communication import all_gather, world_size


def lovasz_softmax(
    probabilities: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = 255, over_world: bool = True
) -> torch.Tensor:
    """Mean over the classes present of the Lovasz extension of the Jaccard loss.

    Args:
        probabilities: [P, K] class probabilities of pixels.
        labels: int64 [P].
        ignore_index: Label of pixels left out.
        over_world: Rank the pixels of all ranks as one set (collective), as the authors' released runs do; otherwise
            this rank's. Gradients averaged over ranks are then those of one loss on all pixels.

    Returns:
        Scalar; 0 with a graph where no pixel is labelled.
    """
    labelled = labels != ignore_index
    probabilities, labels = probabilities[labelled], labels[labelled]
    ranks, rank = (world_size(), dist.get_rank()) if over_world and world_size() > 1 else (1, 0)
    if over_world:
        probabilities, labels = all_gather(probabilities), all_gather(labels)
    present = torch.unique(labels)
    # Ranks that hold the same pixels share the classes out; their losses then average to the mean over all classes.
    own = present[rank::ranks]
    truth = (labels[:, None] == own).to(probabilities.dtype)
    errors, order = (truth - probabilities[:, own]).abs().sort(dim=0, descending=True)
    truth = truth.gather(0, order)
    # Jaccard loss of the prediction that is wrong on the first k pixels, for each k; its steps weigh the errors.
    intersection = truth.sum(dim=0) - truth.cumsum(dim=0)
    union = truth.sum(dim=0) + (1 - truth).cumsum(dim=0)
    steps = torch.diff(1 - intersection / union, dim=0, prepend=torch.zeros_like(errors[:1]))
    loss: torch.Tensor = ranks * (errors * steps).sum() / max(1, len(present))
    # A rank without a class of its own still takes part in the backward pass.
    return loss + 0 * probabilities.sum()
