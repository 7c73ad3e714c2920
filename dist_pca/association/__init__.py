"""Cycle association of the pixels of two domains (PLCA: Kang et al., NeurIPS 2020).

Usable on its own in any trainer: it needs torch and nothing else of this package.
"""

from dist_pca.association.loss import (
    CycleAssociationLoss,
    associate,
    associate_pairs,
    cycle_association,
    cycle_association_pairs,
)
from dist_pca.association.method import diffuse
from dist_pca.association.result import Association
from dist_pca.association.streamed import Matches, find_matches
from dist_pca.distributed import all_gather, all_reduce_sum

__all__ = [
    "Association",
    "CycleAssociationLoss",
    "Matches",
    "all_gather",
    "all_reduce_sum",
    "associate",
    "associate_pairs",
    "cycle_association",
    "cycle_association_pairs",
    "diffuse",
    "find_matches",
]
