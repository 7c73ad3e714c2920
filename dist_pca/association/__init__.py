"""Cycle association of the pixels of two domains: features and labels in, one loss and its diagnostics out.

Usable on its own in any trainer: it needs torch and nothing else of this package.
"""

from dist_pca.association.associate import Association, associate, associate_pairs
from dist_pca.association.diffusion import diffuse
from dist_pca.association.exchange import all_gather, all_reduce_sum
from dist_pca.association.matches import Matches, find_matches

__all__ = [
    "Association",
    "Matches",
    "all_gather",
    "all_reduce_sum",
    "associate",
    "associate_pairs",
    "diffuse",
    "find_matches",
]
