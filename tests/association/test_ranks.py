"""Any number of ranks is one process on the concatenated batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_pca.association import Association, all_gather, associate, associate_pairs
from dist_pca.association.similarity import Similarity
from tests.ranks import run_on_ranks

SIZES = [(11, 7), (5, 9), (8, 4), (3, 12)]
"""Source and target positions of each rank: uneven on purpose."""
CLASSES = 3


def positions(similarity: Similarity, ranks: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def rows(n: int) -> torch.Tensor:
        x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        return x.softmax(dim=1) if similarity == "kl" else x

    sizes = SIZES[:ranks]
    sources, targets = [rows(n) for n, _ in sizes], [rows(n) for _, n in sizes]
    labels = [torch.randint(0, CLASSES, (n,), generator=generator) for n, _ in sizes]
    # The last rank's positions are all ignored: it keeps no cycle.
    labels[-1] = torch.full_like(labels[-1], 255)
    return sources, targets, labels


def numbers(found: Association) -> list[float]:
    ratios = [found.cover_ratio, found.consistent_ratio, found.nats_over_chance, found.kept]
    return [float(value) for value in ratios] + found.kept_per_class.tolist()


def one_rank(rank: int, ranks: int, similarity: Similarity, scope: str, implementation: str) -> dict[str, object]:
    sources, targets, labels = positions(similarity, ranks)
    # A parameter that all ranks share, so that gradients meet as they do in a model.
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
    source, target = (
        (x @ weight) if similarity == "cosine" else (x @ weight).abs() for x in (sources[rank], targets[rank])
    )
    group = None
    if scope == "node":
        pairs = [dist.new_group([r for r in range(ranks) if r // 2 == node]) for node in range((ranks + 1) // 2)]
        group = pairs[rank // 2]
    found = associate(
        source,
        target,
        labels[rank],
        similarity=similarity,
        num_classes=CLASSES,
        group=group,
        gather=scope != "rank",
        implementation=implementation,  # type: ignore[arg-type]
    )
    found.loss.backward()
    loss = found.loss.detach().clone()
    for value in (loss, weight.grad):
        dist.all_reduce(value)
    assert weight.grad is not None
    return {"loss": loss / ranks, "gradient": weight.grad / ranks, "numbers": torch.tensor(numbers(found))}


def one_process(ranks: int, similarity: Similarity, scope: str, implementation: str) -> dict[str, object]:
    sources, targets, labels = positions(similarity, ranks)
    pools = {"world": [range(ranks)], "rank": [[r] for r in range(ranks)]}
    pools["node"] = [[r for r in range(ranks) if r // 2 == node] for node in range((ranks + 1) // 2)]
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)

    def joined(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        rows = [torch.cat([parts[r] for r in pool]) @ weight for pool in pools[scope]]
        return rows if similarity == "cosine" else [x.abs() for x in rows]

    found = associate_pairs(
        joined(sources),
        joined(targets),
        [torch.cat([labels[r] for r in pool]) for pool in pools[scope]],
        similarity=similarity,
        num_classes=CLASSES,
        implementation=implementation,  # type: ignore[arg-type]
    )
    found.loss.backward()
    assert weight.grad is not None
    return {"loss": found.loss.detach(), "gradient": weight.grad, "numbers": torch.tensor(numbers(found))}


@pytest.mark.parametrize(
    ("ranks", "similarity", "scope", "implementation"),
    [
        (2, "cosine", "world", "blockwise"),
        (2, "kl", "world", "reference"),
        (3, "kl", "world", "blockwise"),
        (3, "cosine", "node", "blockwise"),
        (2, "cosine", "rank", "blockwise"),
        pytest.param(4, "cosine", "world", "blockwise", marks=pytest.mark.slow),
        pytest.param(4, "kl", "node", "blockwise", marks=pytest.mark.slow),
        pytest.param(4, "kl", "world", "reference", marks=pytest.mark.slow),
    ],
)
def test_ranks_equal_one_process(
    tmp_path: Path, ranks: int, similarity: Similarity, scope: str, implementation: str
) -> None:
    expected = one_process(ranks, similarity, scope, implementation)
    for found in run_on_ranks(one_rank, ranks, tmp_path, similarity, scope, implementation):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def gather_uneven(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    # Rank 1 has no rows at all.
    own = torch.full((rank * 0 if rank == 1 else rank + 2, 2), float(rank), requires_grad=True)
    gathered = all_gather(own)
    (gathered * torch.arange(len(gathered))[:, None] * (rank + 1)).sum().backward()
    assert own.grad is not None
    return {"gathered": gathered.detach(), "gradient": own.grad}


def test_uneven_and_empty_ranks_are_gathered_in_order_and_gradients_flow_home(tmp_path: Path) -> None:
    results = run_on_ranks(gather_uneven, 3, tmp_path)
    for found in results:
        assert found["gathered"][:, 0].tolist() == [0, 0, 2, 2, 2, 2]
    # Every rank r weighs row k by k * (r + 1); the owner gets the sum over ranks, 6 k.
    assert results[0]["gradient"][:, 0].tolist() == [0, 6]
    assert results[1]["gradient"].shape == (0, 2)
    assert results[2]["gradient"][:, 1].tolist() == [12, 18, 24, 30]
