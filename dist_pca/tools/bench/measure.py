"""One measurement, inside the fresh process of one rank."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dist_pca.association import Association, cycle_association
from dist_pca.association.options import Implementation
from dist_pca.association.streamed import find_matches
from dist_pca.tools.bench.cases import Case, Measured, inputs
from dist_pca.tools.bench.memory import peak_of, return_freed_memory_at_once

WARM_UP_PIXELS = 64
"""Enough to start threads and load libraries, too few to leave memory behind."""
_IMPLEMENTATIONS: dict[Measured, Implementation] = {
    "dense": "reference",
    "blockwise": "blockwise",
    "triton": "triton",
}


@dataclass(frozen=True)
class Reading:
    """What one rank measured of time and exactness; for a bare product only seconds."""

    seconds: list[float]
    """Seconds for value and both gradients, by repeat."""
    seconds_value: list[float]
    """Seconds for the value without gradients, by repeat."""
    loss: float | None = None
    """The mean over the kept cycles of all ranks."""
    gradient_difference: float | None = None
    """Largest absolute difference from the reference, None where there is none."""
    kept_ratio: float | None = None
    cover_ratio: float | None = None
    communication_bytes: int | None = None
    unavoidable_products: float | None = None


@dataclass(frozen=True)
class ReferenceValues:
    """What errors are relative to."""

    loss: float
    largest_gradient: float


def measure_peak(rank: int, case: Case, store: Path) -> int | None:
    """Peak memory of value and both gradients on this rank, in bytes; None if the system does not report it.

    Ranks meet at the file `store`.
    """
    return_freed_memory_at_once()
    with _world(rank, case, store) as device:
        if case.implementation == "matmul":
            rows, keys = _factors(rank, case, device)
            torch.mm(rows[:WARM_UP_PIXELS], keys[:WARM_UP_PIXELS].T)
            return peak_of(lambda: torch.mm(rows, keys.T), device)
        _association(case, *(x[:WARM_UP_PIXELS].to(device) for x in inputs(case, rank)))
        source, target, labels = (x.to(device) for x in inputs(case, rank))
        return peak_of(lambda: _association(case, source, target, labels), device)


def measure(rank: int, case: Case, store: Path, reference: Path | None) -> Reading:
    """Time and exactness of a case on this rank. Ranks meet at the file `store`."""
    with _world(rank, case, store) as device:
        if case.implementation == "matmul":
            rows, keys = _factors(rank, case, device)
            # Into the same memory each time: the yardstick shall not pay for fresh pages.
            product = torch.mm(rows, keys.T)
            return Reading(_seconds(lambda: torch.mm(rows, keys.T, out=product), case, device), seconds_value=[])
        source, target, labels = (x.to(device) for x in inputs(case, rank))
        association, gradients = _association(case, source, target, labels)
        return Reading(
            seconds=_seconds(lambda: _association(case, source, target, labels), case, device),
            seconds_value=_seconds(lambda: _value(case, source, target, labels), case, device),
            loss=_mean_over_ranks(association.loss.detach(), case),
            gradient_difference=None if reference is None else _difference(rank, case, gradients, reference),
            kept_ratio=float(association.kept_ratio),
            cover_ratio=float(association.cover_ratio),
            communication_bytes=int(association.communication_bytes) if case.world_size > 1 else None,
            unavoidable_products=None if case.world_size > 1 else unavoidable_products(case, source, target, labels),
        )


def unavoidable_products(case: Case, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> float:
    """Products of n x C and C x n that value and both gradients take at least, in memory linear in n.

    One gives all similarities. A source pixel whose cycle is kept takes part in the products of its row's softmax for
    both gradients. A target with a kept cycle takes part in two of its own softmax, too, and in one for its
    similarities, which are there no more: its weight is known only after all source pixels are matched. Whether a
    source pixel's cycle is kept is known only once its target is matched back, either in a product of its own before
    the source pixel's similarities go, or after all of them have been seen, and then they are computed again.
    """
    matches = find_matches(source, target, similarity=case.similarity)
    kept = labels == labels[matches.ends]
    matched, targets = (len(torch.unique(chosen)) / case.n for chosen in (matches.targets, matches.targets[kept]))
    kept_share = float(kept.float().mean())
    return 1 + min(matched, kept_share) + 2 * kept_share + 3 * targets


def compute_reference(rank: int, case: Case, file: Path) -> ReferenceValues:
    """The definition on all ranks' pixels in fp64, in this one process; gradients [2, n * W, C] go to a file."""
    torch.set_num_threads(case.threads * case.world_size)
    parts = [inputs(case, part) for part in range(case.world_size)]
    source, target, labels = (torch.cat(same) for same in zip(*parts, strict=True))
    source, target = source.double().requires_grad_(), target.double().requires_grad_()
    loss = cycle_association(
        source, target, labels, similarity=case.similarity, num_classes=case.classes, implementation="reference"
    ).loss
    gradients = torch.stack(torch.autograd.grad(loss, (source, target)))
    torch.save(gradients, file)
    return ReferenceValues(float(loss.detach()), float(gradients.abs().max()))


@contextmanager
def _world(rank: int, case: Case, store: Path) -> Iterator[torch.device]:
    torch.set_num_threads(case.threads)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if case.world_size == 1:
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=case.world_size)
    yield device
    # A rank whose measurement needs no others would leave while these still connect to it.
    dist.barrier()
    dist.destroy_process_group()


def _value(case: Case, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> Association:
    return cycle_association(
        source,
        target,
        labels,
        similarity=case.similarity,
        num_classes=case.classes,
        communication=case.communication or "local",
        implementation=_IMPLEMENTATIONS[case.implementation],
        dtype=case.dtype,
        comm_dtype=case.dtype,
    )


def _association(
    case: Case, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor
) -> tuple[Association, tuple[torch.Tensor, ...]]:
    source, target = source.detach().requires_grad_(), target.detach().requires_grad_()
    association = _value(case, source, target, labels)
    return association, torch.autograd.grad(association.loss, (source, target))


def _factors(rank: int, case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's rows [n, C] and as many as all ranks have [n * W, C], whose product the yardstick is."""
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    source, target, _ = inputs(case, rank)
    return source.to(device, dtype), target.to(device, dtype).repeat(case.world_size, 1)


def _seconds(call: Callable[[], object], case: Case, device: torch.device) -> list[float]:
    """Times of up to `repeats` calls, which all ranks begin together and of which all do the same number."""
    taken: list[float] = []
    elapsed = torch.zeros(1, device=device)
    while len(taken) < case.repeats and elapsed < case.max_seconds:
        _synchronise(case, device)
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
        # Freed outside of the measured time.
        del result
        elapsed += taken[-1]
        if case.world_size > 1:
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return taken


def _synchronise(case: Case, device: torch.device) -> None:
    if case.world_size > 1:
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mean_over_ranks(loss: torch.Tensor, case: Case) -> float:
    total = loss.clone()
    if case.world_size > 1:
        dist.all_reduce(total)
    return float(total) / case.world_size


def _difference(rank: int, case: Case, gradients: tuple[torch.Tensor, ...], reference: Path) -> float:
    own = slice(rank * case.n, (rank + 1) * case.n)
    expected = torch.load(reference, weights_only=True, mmap=True)[:, own]
    # A rank's gradient counts W times: those who train average over ranks.
    found = torch.stack([gradient.cpu().double() for gradient in gradients]) / case.world_size
    return float((found - expected).abs().max())
