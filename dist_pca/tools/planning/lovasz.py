"""What the Lovasz-Softmax term takes of one rank: memory and bytes sent."""

from math import ceil

from dist_pca.config import LovaszConfig
from dist_pca.objective.lovasz import CPU_BLOCK_PIXELS, GPU_BLOCK_PIXELS
from dist_pca.tools.planning.hardware import Cluster
from dist_pca.tools.planning.term import Term, all_gather, all_reduce, reduce_scatter


def ranks_together(config: LovaszConfig, cluster: Cluster) -> int:
    """Ranks whose pixels are ranked together; 1 where each has a loss of its own."""
    return {"rank": 1, "node": cluster.per_node, "world": cluster.size}[config.scope]


def memory(pixels: int, classes: int, ranks: int, bins: int | None, device: str) -> Term:
    """Bytes beyond the probabilities that are given in and the gradient that comes out, with every pixel labelled.

    Args:
        pixels: Source pixels on this rank.
        classes: Number of classes; all are there.
        ranks: Ranks whose pixels are ranked together; 1 where each has a loss of its own.
        bins: Bins in which errors are counted; None where they are sorted.
        device: A GPU's name, or `cpu`.
    """
    if bins is not None:
        gradient, counts = 4.0 * pixels * classes, 8.0 * 2 * classes * bins
        # Errors, indices of bins and weights of a block, beside the counts and what they become; before that, sums of
        # the counts in fp64.
        size = CPU_BLOCK_PIXELS if device == "cpu" else GPU_BLOCK_PIXELS
        block = 25.0 * min(pixels, size) * classes + 1.5 * counts
        return Term(gradient, max(gradient + block, 6.6 * counts), gradient)
    everyone = ranks * pixels
    table = 4.0 * everyone * classes
    # Errors are sorted for the classes that are this rank's; in fp32, with indices in int64.
    column = 4.0 * everyone * ceil(classes / ranks)
    gathered = table if ranks > 1 else 0.0
    own = 4.0 * pixels * classes
    numbers = 8.0 * (2 * pixels + everyone)
    saved = 4 * column + 8 * pixels
    sorting = (own if ranks == 1 else gathered) + 10 * column
    sharing = own + 2 * gathered
    return Term(saved, numbers + max(sharing, sorting), max(saved + column, 2 * table))


def sent_bytes(pixels: int, classes: int, ranks: int, bins: int | None) -> float:
    """Bytes that a rank sends to others: counts, or probabilities and labels, and on the way back their gradients."""
    if bins is not None:
        return all_reduce(8 * 2 * classes * bins, ranks)
    forward = all_gather(4 * pixels * classes + 8 * pixels, ranks)
    return forward + reduce_scatter(4 * ranks * pixels * classes, ranks)
