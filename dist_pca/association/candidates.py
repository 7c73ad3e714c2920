"""Candidates: the pixels that a query is compared with, on one rank or on many, and their communication.

Keys are distributed in one of three ways: all of them are local (`local`), every rank gathers all of them (`gather`),
or a block at a time is sent from rank to rank (`ring`), which keeps the memory per rank the same for any number of
ranks. Gradients with respect to keys are reduce-scattered to their ranks within the same call, so autograd's backward
pass needs no communication and no rank can be left waiting in it. A profiler or watchdog may ask for the phases of the
loss, of which communication is one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

Communication = Literal["local", "gather", "ring"]
Phase = Literal["association", "communication"]

_enter: Callable[[Any], Any] | None = None


def listen(enter: Callable[[Any], Any] | None) -> None:
    """Register the callback of a profiler or watchdog, `enter(new_phase) -> old_phase`; None removes it."""
    global _enter
    _enter = enter


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Report that a phase begins, and at the end that the previous one resumes."""
    enter = _enter
    if enter is None:
        yield
        return
    previous = enter(name)
    yield
    enter(previous)


@dataclass
class CandidateGroup:
    """Ranks whose pixels are candidates for each other, and the bytes that this rank has sent to the others."""

    communication: Communication
    process_group: dist.ProcessGroup | None
    """None is the world."""
    rank: int
    """This rank within the group; 0 if `local`."""
    ranks: int
    """Ranks in the group; 1 if `local`."""
    source_counts: list[int]
    """Source pixels of each rank."""
    target_counts: list[int]
    """Target pixels of each rank."""
    comm_dtype: torch.dtype | None = None
    """Type in which keys are sent; None for their own. Gradients accumulated in a ring stay in fp32 or fp64."""
    sent_bytes: int = field(default=0)
    """Bytes sent so far by this rank."""

    @property
    def source_slice(self) -> slice:
        """This rank's source pixels among those of all ranks."""
        return _rank_slice(self.source_counts, self.rank)

    @property
    def target_slice(self) -> slice:
        """This rank's target pixels among those of all ranks."""
        return _rank_slice(self.target_counts, self.rank)

    @phase("communication")
    def all_reduce_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group's ranks, in place. Collective."""
        if self.ranks > 1:
            dist.all_reduce(x, group=self.process_group)
            # A ring all-reduce is a reduce-scatter and an all-gather, each of (ranks - 1) / ranks of the tensor.
            self.sent_bytes += 2 * (self.ranks - 1) * _bytes(x) // self.ranks
        return x

    @phase("communication")
    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Concatenate the rows of all ranks in rank order: [counts[rank], ...] to [sum counts, ...]. Collective."""
        if self.ranks == 1:
            return x
        # Collectives need equal shapes on every rank, so rows are padded to the largest count.
        largest = max(counts)
        padded = x if len(x) == largest else torch.cat([x, x.new_zeros((largest - len(x), *x.shape[1:]))])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous(), group=self.process_group)
        self.sent_bytes += (self.ranks - 1) * _bytes(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def distribute_keys(self, keys: torch.Tensor, counts: list[int], dtype: torch.dtype) -> "CandidateKeys":
        """Build the group's keys from this rank's [counts[rank], C]. Collective under `gather`.

        Args:
            keys: This rank's keys.
            counts: Keys of each rank.
            dtype: Type of the keys in matmuls.
        """
        if self.communication == "ring" and self.ranks > 1:
            return CandidateKeys(self, keys.to(self.comm_dtype or dtype), counts, dtype)
        if self.ranks > 1:
            keys = self.all_gather(keys.to(self.comm_dtype or dtype), counts)
        return CandidateKeys(self, keys.to(dtype), counts, dtype)

    @phase("communication")
    def reduce_scatter_add(self, gradient: torch.Tensor, counts: list[int], local: torch.Tensor) -> None:
        """Add the sum over ranks of this rank's rows of `gradient` [sum counts, C] to `local`. Collective.

        Rows are sent in `comm_dtype` and added in rank order in the type of `local`: `dist.reduce_scatter` would add in
        the type that is sent and in an order of its own.
        """
        sent = gradient if self.comm_dtype is None else gradient.to(self.comm_dtype)
        received = sent.new_empty((self.ranks * len(local), sent.shape[1]))
        dist.all_to_all_single(received, sent, [len(local)] * self.ranks, counts, group=self.process_group)
        self.sent_bytes += _bytes(sent) - _bytes(sent[: counts[self.rank]])
        for part in torch.split(received, len(local)):
            local += part

    def ring_send_recv(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> list[dist.Work]:
        """Start sending to the next rank and receiving from the previous one."""
        following, previous = ((self.rank + step) % self.ranks for step in (1, -1))
        group = self.process_group or dist.group.WORLD
        assert group is not None
        self.sent_bytes += _bytes(outgoing)
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, dist.get_global_rank(group, following), self.process_group),
                dist.P2POp(dist.irecv, incoming, dist.get_global_rank(group, previous), self.process_group),
            ]
        )


@dataclass(frozen=True)
class CandidateKeys:
    """Keys of all candidates, iterated block by block.

    Where `scale` and `shift` are given, `rows` are unnormalised and `logits = (q @ rows.T) * scale - q @ shift`.
    """

    candidates: CandidateGroup
    rows: torch.Tensor
    """[N, C] keys of all ranks, or under `ring` this rank's [counts[rank], C]."""
    counts: list[int]
    """Keys of each rank."""
    dtype: torch.dtype
    """Type of the keys in matmuls."""
    scale: torch.Tensor | None = None
    """[N] inverse norms."""
    shift: torch.Tensor | None = None
    """[C] mean key."""

    @property
    def is_single_block(self) -> bool:
        """Whether one block has all keys."""
        return len(self.rows) == sum(self.counts)

    def blocks(
        self, local_gradient: torch.Tensor | None = None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Iterate over (index of the first key, block of keys [k, C], gradient buffer [k, C] or None).

        Collective under `ring`, and under `gather` with a gradient. Under `ring` the next block is received while the
        caller works on the current one; blocks come, and gradients are added, in the same order every time.

        Args:
            local_gradient: [counts[rank], C], gradient with respect to this rank's keys. If given, the caller adds to
                each block's buffer, and at the end the sum over all ranks has been added to `local_gradient`.
        """
        candidates = self.candidates
        if candidates.ranks == 1:
            if local_gradient is None or local_gradient.is_cuda:
                yield 0, self.rows, local_gradient
            else:
                # Tiles on a CPU add to it faster, see `backward_matmuls`.
                transposed = local_gradient.new_zeros(local_gradient.T.shape)
                yield 0, self.rows, transposed.T
                local_gradient += transposed.T
        elif candidates.communication == "gather":
            gradient = None if local_gradient is None else local_gradient.new_zeros(self.rows.shape)
            yield 0, self.rows, gradient
            if local_gradient is not None and gradient is not None:
                candidates.reduce_scatter_add(gradient, self.counts, local_gradient)
        else:
            yield from self._ring_blocks(local_gradient)

    def _ring_blocks(
        self, local_gradient: torch.Tensor | None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        candidates, block = self.candidates, self.rows
        incoming = None
        gradient_transfer: list[dist.Work] = []
        for step in range(candidates.ranks):
            # In step s this rank has the keys of rank - s, and receives those of rank - s - 1.
            owner, next_owner = ((candidates.rank - step - offset) % candidates.ranks for offset in (0, 1))
            next_block = block.new_empty((self.counts[next_owner], block.shape[1]))
            key_transfer = candidates.ring_send_recv(block, next_block) if step < candidates.ranks - 1 else []
            gradient = None if local_gradient is None else local_gradient.new_zeros(block.shape)
            yield sum(self.counts[:owner]), block.to(self.dtype), gradient
            if gradient is not None:
                # The sum over the previous ranks arrives one step behind its keys; this rank's part is added to it.
                _wait(gradient_transfer)
                if incoming is not None:
                    gradient += incoming
                incoming = gradient.new_empty(next_block.shape)
                outgoing = gradient
                gradient_transfer = candidates.ring_send_recv(outgoing, incoming)
            _wait(key_transfer)
            block = next_block
        if local_gradient is not None and incoming is not None:
            # The last transfer brings the complete sum of this rank's own keys.
            _wait(gradient_transfer)
            local_gradient += incoming


@phase("communication")
def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _rank_slice(counts: list[int], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
