"""Contrast of pixels with a normal distribution for each class, as if infinitely many further candidates were drawn.

SePiCo's distribution-aware contrast (Xie et al., TPAMI 2023). Means and variances are of the teacher's features at the
labelled source pixels, and move from batch to batch.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from dist_pca.distributed import all_reduce_sum
from dist_pca.objective.domains import IGNORE_INDEX
from dist_pca.objective.reduction import world_mean


@dataclass
class ClassStatistics:
    """Moving mean and diagonal variance of unit-length features by class, the same on all ranks."""

    seen: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """bool [K], classes that have had a pixel; empty before the first batch."""
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """fp32 [K, C]."""
    variance: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """fp32 [K, C]."""

    def update(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int, *, decay: float) -> None:
        """Move towards the statistics of a batch. Collective.

        Args:
            features: [n, C], this rank's pixels; scaled to unit length here.
            labels: int64 [n], below `num_classes`, or 255 for pixels that are left out.
            num_classes: Number of classes K.
            decay: Share of the old statistics that is kept in each class that has pixels on any rank.
        """
        known = labels != IGNORE_INDEX
        # Sums of squares lose the variance's digits in fp32.
        pixels, classes = F.normalize(features.detach()[known].double(), dim=1), labels[known]
        sums = pixels.new_zeros(num_classes, 2 * pixels.shape[1] + 1)
        sums.index_add_(0, classes, torch.cat([pixels, pixels.square(), pixels.new_ones(len(pixels), 1)], dim=1))
        channels = pixels.shape[1]
        sums = all_reduce_sum(sums)
        first, second, count = sums[:, :channels], sums[:, channels:-1], sums[:, -1:]
        mean = first / count.clamp(min=1)
        variance = (second / count.clamp(min=1) - mean.square()).clamp(min=0)
        if not len(self.seen):
            self.seen, self.mean = torch.zeros_like(count[:, 0], dtype=torch.bool), torch.zeros_like(mean).float()
            self.variance = torch.zeros_like(self.mean)
        present = count[:, 0] > 0
        # A class starts with the statistics of its first batch.
        kept = torch.where(present, torch.where(self.seen, decay, 0.0), 1.0)[:, None]
        self.mean = (kept * self.mean + (1 - kept) * mean).float()
        self.variance = (kept * self.variance + (1 - kept) * variance).float()
        self.seen = self.seen | present


def class_contrast(
    features: torch.Tensor, classes: torch.Tensor, statistics: ClassStatistics, *, temperature: float
) -> torch.Tensor:
    """InfoNCE of pixels whose candidates are the distributions of all classes (SePiCo, equation 10). Collective.

    `-log(exp(l_y) / sum_c exp(l_c))` with `l_c = z . mean_c / t + z^2 . variance_c / (2 t^2)`, averaged over the pixels
    of all ranks: an upper bound of the expected InfoNCE with candidates `Normal(mean_c, diag(variance_c))`.

    Args:
        features: [n, C], scaled to unit length here.
        classes: int64 [n], 255 for pixels that are left out, as are those of classes without statistics.
        statistics: Mean and variance of each class.
        temperature: Temperature t, above 0.

    Returns:
        Scalar, scaled so that the average of gradients over ranks is the gradient of the mean over all ranks' pixels;
        0, with a graph, if there are none.
    """
    z = F.normalize(features.float(), dim=1)
    # l_c, minus infinity for classes without statistics
    logits = z @ statistics.mean.T / temperature + z.square() @ statistics.variance.T / (2 * temperature**2)
    logits = logits.masked_fill(~statistics.seen, -torch.inf)
    used = classes != IGNORE_INDEX
    used &= statistics.seen[torch.where(used, classes, 0)]
    return world_mean(F.cross_entropy(logits[used], classes[used], reduction="sum"), used.sum())
