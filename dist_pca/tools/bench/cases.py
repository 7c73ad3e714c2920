"""What one measurement of association is of, and the pixels that it gets."""

from dataclasses import dataclass
from typing import Literal

import torch

from dist_pca.association.options import Similarity

Measured = Literal["dense", "blockwise", "triton", "matmul"]
Communication = Literal["gather", "ring"]
Precision = Literal["fp32", "bf16"]
Data = Literal["clustered", "random", "shares"]

CONFUSED = 0.18
"""Share of clustered pixels that look like some other class than their own."""
KEPT, COVER = 0.72, 0.22
"""Shares of kept cycles and matched targets where one of the two is given: those of networks in training."""
AROUND = 0.5
"""Standard deviation of a source pixel around the target that it matches, whose own is 1."""
GAP = 3.0
"""How far the farthest clustered targets lie from the source domain, in deviations of the class centres."""


@dataclass(frozen=True)
class Case:
    """One implementation on one size of problem."""

    implementation: Measured
    """`dense` is the definition, differentiated by autograd; `matmul` one product of a rank's rows with all ranks'."""
    dtype: Precision
    """What products are computed in, and what travels between ranks; inputs are fp32, except those of `matmul`."""
    n: int
    """Pixels of each domain on each rank."""
    channels: int
    world_size: int
    communication: Communication | None
    """None in a world of one, and for `matmul`."""
    similarity: Similarity
    data: Data
    spread: float
    classes: int
    seed: int
    repeats: int
    max_seconds: float
    """No further repeat is begun after that long."""
    threads: int
    """CPU threads of each rank."""
    kept: float | None = None
    """Share of source pixels whose cycle is kept, for `shares`."""
    cover: float | None = None
    """Share of target pixels that are matched, for `shares`."""

    @property
    def pixels(self) -> int:
        """Pixels of each domain on all ranks together."""
        return self.n * self.world_size


def inputs(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source [n, C], target [n, C] and source labels [n] of one rank, fp32 on the CPU, the same for the same seed.

    `clustered` rows are a class centre, normal in each channel, plus `spread` times normal noise; a share of them looks
    like a class that is not its own. Targets are moved off in one direction, each by another amount, as domains are:
    those nearest to the source are matched by many. At a spread of 1.5, with 8,464 pixels and 19 classes, about 0.73
    of cycles hold and 0.22 of targets are matched; networks in training on street scenes show 0.63 to 0.78 and 0.12 to
    0.21. `random` rows and labels have nothing to do with each other: cycles hold that end where they began, and of the
    rest one in `classes`.
    `shares` has given shares of kept cycles and matched targets instead. For `kl` the rows go through a softmax.
    """
    if case.data == "shares":
        return _with_shares(case, rank)
    shared = torch.Generator().manual_seed(case.seed)
    centres = torch.randn(case.classes, case.channels, generator=shared)
    away = torch.randn(case.channels, generator=shared)
    own = torch.Generator().manual_seed(case.seed + 1 + rank)
    labels = torch.randint(case.classes, (2, case.n), generator=own)
    rows = []
    for domain in range(2):
        x = torch.randn(case.n, case.channels, generator=own)
        if case.data == "clustered":
            strange = torch.rand(case.n, generator=own) < CONFUSED
            look = torch.where(strange, torch.randint(case.classes, (case.n,), generator=own), labels[domain])
            x.mul_(case.spread).add_(centres[look])
            if domain == 1:
                x.add_(GAP * torch.rand(case.n, 1, generator=own) * away)
        rows.append(x.softmax(dim=1) if case.similarity == "kl" else x)
    return rows[0], rows[1], labels[0]


def _with_shares(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and labels of which shares `case.kept` and `case.cover` come out, in channels enough to separate targets.

    The first targets are matched, each by the sources around it. One of these, its leader, equals it, and is therefore
    the match back; those with the leader's label are kept.
    """
    own = torch.Generator().manual_seed(case.seed + 1 + rank)
    matched = max(1, round((case.cover or 0.0) * case.n))
    target = torch.randn(case.n, case.channels, generator=own)
    # The first sources are leaders, and every further one follows a leader.
    leaders = torch.arange(case.n) % matched
    source = target[leaders]
    source[matched:] += AROUND * torch.randn(case.n - matched, case.channels, generator=own)
    labels = torch.randint(case.classes, (case.n,), generator=own)[leaders]
    lost = case.n - max(matched, round((case.kept or 0.0) * case.n))
    if lost > 0:
        labels[-lost:] = (labels[-lost:] + 1) % case.classes
    order = torch.randperm(case.n, generator=own)
    rows = (source[order], target[torch.randperm(case.n, generator=own)])
    source, target = (x.softmax(dim=1) if case.similarity == "kl" else x for x in rows)
    return source, target, labels[order]
