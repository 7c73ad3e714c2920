"""Collectives through NCCL with one rank, where each must give back what it was given, and with two where there are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_pca.association import cycle_association
from dist_pca.association.candidates import CandidateGroup
from dist_pca.distributed import all_gather, all_reduce_sum, raise_on_all_ranks
from dist_pca.errors import UserError
from tests.association.pixels import CLASSES, domain, labels_of
from tests.gpu.devices import BACKENDS, DEVICES, one_rank
from tests.support.ranks import run_on_ranks

SIZES = [(61, 47), (35, 59)]
"""Source and target pixels of each rank."""
RANKS = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu(2), pytest.mark.slow]),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_reduce_scatter_over_one_rank_adds_the_gradient_as_it_was_sent(device: str) -> None:
    with one_rank(device):
        for comm_dtype in (None, torch.bfloat16):
            group = CandidateGroup("gather", None, 0, 1, [7], [7], comm_dtype)
            gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(device)
            local = torch.ones(7, 5, device=device)
            group.reduce_scatter_add(gradient, [7], local)
            sent = gradient if comm_dtype is None else gradient.to(comm_dtype).float()
            assert torch.equal(local, 1 + sent)


@pytest.mark.parametrize("device", DEVICES)
def test_a_message_reaches_all_ranks(device: str) -> None:
    with one_rank(device):
        raise_on_all_ranks(None)
        with pytest.raises(UserError, match="the disk is full"):
            raise_on_all_ranks("the disk is full")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("communication", ["gather", "ring"])
def test_association_in_a_group_of_one_is_that_without_a_group(communication: Any, device: str) -> None:
    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        source, target = (domain(n, 6, "cosine", n).float().to(device).requires_grad_() for n in (40, 30))
        labels = labels_of(40, 0).to(device)
        options: dict[str, Any] = {"communication": communication, "deterministic": True}
        loss = cycle_association(source, target, labels, num_classes=CLASSES, **options).loss
        loss.backward()
        assert source.grad is not None
        return loss.detach(), source.grad

    expected = loss_and_gradient()
    with one_rank(device):
        found = loss_and_gradient()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def exchange(rank: int, ranks: int, device: str) -> dict[str, torch.Tensor]:
    """What ranks give each other, by kind of communication."""
    x = torch.arange(3.0 + rank, device=device).requires_grad_()
    gathered = all_gather(x)
    (gathered * torch.arange(len(gathered), device=device)).sum().backward()
    assert x.grad is not None
    found = {"sum": all_reduce_sum(torch.ones(3, device=device) + rank), "gathered": gathered.detach(), "back": x.grad}
    for name in ("gather", "ring"):
        n, m = SIZES[rank]
        source, target = (domain(k, 6, "cosine", k).float().to(device).requires_grad_() for k in (n, m))
        labels = labels_of(n, rank).to(device)
        result = cycle_association(source, target, labels, num_classes=CLASSES, communication=name)
        result.loss.backward()
        assert source.grad is not None
        assert target.grad is not None
        # Ranks' losses and gradients are averaged, as data parallel training does.
        found |= {f"loss {name}": result.loss.detach() / ranks, f"source {name}": source.grad / ranks}
        found[f"target {name}"] = target.grad / ranks
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("device", RANKS)
def test_two_ranks_gather_reduce_and_associate_as_one_process_does(device: str, tmp_path: Path) -> None:
    one, two = run_on_ranks(exchange, 2, tmp_path, device, backend=BACKENDS[device])
    assert one["sum"].tolist() == two["sum"].tolist() == [3.0] * 3
    assert one["gathered"].tolist() == two["gathered"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert one["back"].tolist() == [0, 2, 4]
    assert two["back"].tolist() == [6, 8, 10, 12]
    source, target = (
        torch.cat([domain(sizes[side], 6, "cosine", sizes[side]).float() for sizes in SIZES]).requires_grad_()
        for side in (0, 1)
    )
    labels = torch.cat([labels_of(n, rank) for rank, (n, _) in enumerate(SIZES)])
    whole = cycle_association(source, target, labels, num_classes=CLASSES)
    whole.loss.backward()
    for name in ("gather", "ring"):
        torch.testing.assert_close(one[f"loss {name}"] + two[f"loss {name}"], whole.loss.detach(), rtol=1e-5, atol=0)
        for side, expected in (("source", source.grad), ("target", target.grad)):
            found = torch.cat([rank[f"{side} {name}"] for rank in (one, two)])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
