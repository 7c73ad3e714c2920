"""Lovasz-Softmax (Berman, Rannen Triki and Blaschko, CVPR 2018): a convex surrogate of the mean IoU."""

import torch
import torch.distributed as dist

from dist_pca.distributed import all_gather, world_size


def lovasz_softmax(
    probabilities: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = 255, over_world: bool = True
) -> torch.Tensor:
    """Lovasz extension of the Jaccard loss, averaged over the classes that occur.

    Args:
        probabilities: Class probabilities of pixels, [P, K].
        labels: Labels of pixels, int64 [P].
        ignore_index: Label of pixels that are left out.
        over_world: Sort the pixels of all ranks as one set (collective), as in the authors' released runs, instead of
            this rank's pixels. The average of gradients over ranks is then the gradient of one loss on all pixels.

    Returns:
        Scalar; 0, with a graph, if no pixel is labelled.
    """
    labelled = labels != ignore_index
    probabilities, labels = probabilities[labelled], labels[labelled]
    ranks, rank = (world_size(), dist.get_rank()) if over_world and world_size() > 1 else (1, 0)
    if over_world:
        probabilities, labels = all_gather(probabilities), all_gather(labels)
    present = torch.unique(labels)
    # If ranks have the same pixels, classes are divided among them; the average of their losses is the mean over all.
    own = present[rank::ranks]
    truth = (labels[:, None] == own).to(probabilities.dtype)
    errors, order = (truth - probabilities[:, own]).abs().sort(dim=0, descending=True)
    truth = truth.gather(0, order)
    # For each k, the Jaccard loss of a prediction that is wrong on the first k pixels; its increments weigh the errors.
    intersection = truth.sum(dim=0) - truth.cumsum(dim=0)
    union = truth.sum(dim=0) + (1 - truth).cumsum(dim=0)
    steps = torch.diff(1 - intersection / union, dim=0, prepend=torch.zeros_like(errors[:1]))
    loss: torch.Tensor = ranks * (errors * steps).sum() / max(1, len(present))
    # A rank without any class must still take part in the backward pass.
    return loss + 0 * probabilities.sum()
