"""Following the loss from features to gradient takes few files."""

from pathlib import Path
from typing import Any

import pytest

from dist_pca.association import CycleAssociationLoss
from tests.association.pixels import CLASSES, domain, labels_of, refinements
from tests.support.files_run import files_run
from tests.support.ranks import run_on_ranks

MOST, MOST_ON_RANKS = 10, 11


def features_to_gradient(rank: int, ranks: int, options: dict[str, Any], given: dict[str, bool]) -> list[str]:
    def call() -> None:
        source, target = (domain(n, 6, "cosine", n + rank).requires_grad_() for n in (40, 30))
        drawn = refinements(40, 30, 6, "cosine", rank, **given)
        criterion = CycleAssociationLoss(CLASSES, detach_statistics=False, **options)
        criterion(source, target, labels_of(40, rank), target_labels=labels_of(30, rank), **drawn).loss.backward()

    return sorted(files_run(call))


@pytest.mark.parametrize("implementation", ["blockwise", "online_softmax", "reference"])
@pytest.mark.parametrize("given", [{}, {"classes": True, "weights": True, "guide": True}])
def test_one_process_runs_through_ten_files(implementation: str, given: dict[str, bool]) -> None:
    files = features_to_gradient(0, 1, {"implementation": implementation}, given)
    assert len(files) <= MOST, "\n".join(files)


def each_exchange(rank: int, ranks: int) -> dict[str, list[str]]:
    return {name: features_to_gradient(rank, ranks, {"communication": name}, {}) for name in ("gather", "ring")}


def test_ranks_run_through_eleven_files(tmp_path: Path) -> None:
    for by_exchange in run_on_ranks(each_exchange, 2, tmp_path):
        for communication, files in by_exchange.items():
            assert len(files) <= MOST_ON_RANKS, "\n".join([communication, *files])
