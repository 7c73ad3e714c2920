"""What is minimised: every term of the method, each the same on any number of ranks."""

from dist_pca.objective.objective import Domain, objective

__all__ = ["Domain", "objective"]
