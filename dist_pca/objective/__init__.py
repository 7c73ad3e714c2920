"""The terms of the training loss; none depends on the world size."""

from dist_pca.objective.domains import Domain, Domains
from dist_pca.objective.objective import objective

__all__ = ["Domain", "Domains", "objective"]
