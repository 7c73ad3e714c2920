"""What is minimised: every term of the method, each the same on any number of ranks."""

from dist_pca.objective.domains import Domain, Domains
from dist_pca.objective.objective import objective

__all__ = ["Domain", "Domains", "objective"]
