"""The positions that are candidates for each other, on one rank or on many, and how they travel.

Keys are shared in one of three ways: they are all here already (`local`), every rank gathers all of them (`gather`), or
they go round from rank to rank a block at a time (`ring`), which keeps the memory per rank the same for any number of
ranks. Gradients of keys come home to the rank that owns them within the same call, so the backward pass of autograd
has nothing to exchange and no rank can be left waiting in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from dist_pca.association.phases import phase

Exchange = Literal["local", "gather", "ring"]


@dataclass
class Pool:
    """The ranks whose positions form one pool, and the bytes this rank has sent to the others."""

    exchange: Exchange
    group: dist.ProcessGroup | None
    """None is the world."""
    rank: int
    """This rank within the group; 0 where the pool is local."""
    ranks: int
    """Ranks in the group; 1 where the pool is local."""
    source_counts: list[int]
    """Source pixels of each of its ranks."""
    target_counts: list[int]
    wire: torch.dtype | None = None
    """Type of keys under way; None leaves theirs. Gradients that are added up on the way stay in fp32 or more."""
    sent_bytes: int = field(default=0)

    @phase("exchange")
    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the pool's ranks, in place. Collective."""
        if self.ranks > 1:
            dist.all_reduce(x, group=self.group)
            # What a ring all-reduce sends: its sum goes round once in parts, and once more to be told.
            self.sent_bytes += 2 * (self.ranks - 1) * _bytes(x) // self.ranks
        return x

    @phase("exchange")
    def gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows [sum counts, ...] of all ranks in rank order, of this rank's rows. Collective."""
        if self.ranks == 1:
            return x
        # Collectives want equal shapes on every rank, so all travel padded to the largest.
        largest = max(counts)
        padded = x if len(x) == largest else torch.cat([x, x.new_zeros((largest - len(x), *x.shape[1:]))])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous(), group=self.group)
        self.sent_bytes += (self.ranks - 1) * _bytes(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def share(self, keys: torch.Tensor, counts: list[int], dtype: torch.dtype) -> "Keys":
        """Keys of all ranks, of this rank's [counts[rank], C], for passes in `dtype`. Collective under `gather`."""
        if self.exchange == "ring" and self.ranks > 1:
            return Keys(self, keys.to(self.wire or dtype), counts, dtype)
        if self.ranks > 1:
            keys = self.gather(keys.to(self.wire or dtype), counts)
        return Keys(self, keys.to(dtype), counts, dtype)

    @phase("exchange")
    def bring_home(self, gradient: torch.Tensor, counts: list[int], own: torch.Tensor) -> None:
        """Add to `own` the sum over ranks of the rows of `gradient` [sum counts, C] that are this rank's. Collective.

        Rows travel as they are and are added up here in rank order: a reduce-scatter would add in the wire's type and
        in an order of its own.
        """
        sent = gradient if self.wire is None else gradient.to(self.wire)
        received = sent.new_empty((self.ranks * len(own), sent.shape[1]))
        dist.all_to_all_single(received, sent, [len(own)] * self.ranks, counts, group=self.group)
        self.sent_bytes += _bytes(sent) - _bytes(sent[: counts[self.rank]])
        for part in torch.split(received, len(own)):
            own += part

    def pass_on(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> list[dist.Work]:
        """Start sending to the next rank and receiving from the one before."""
        after, before = ((self.rank + step) % self.ranks for step in (1, -1))
        group = self.group or dist.group.WORLD
        assert group is not None
        self.sent_bytes += _bytes(outgoing)
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, dist.get_global_rank(group, after), self.group),
                dist.P2POp(dist.irecv, incoming, dist.get_global_rank(group, before), self.group),
            ]
        )


@dataclass(frozen=True)
class Keys:
    """Key rows of a pool, to be passed over block by block."""

    pool: Pool
    held: torch.Tensor
    """All rows, or under `ring` this rank's."""
    counts: list[int]
    dtype: torch.dtype
    scale: torch.Tensor | None = None
    """[N], where products with the rows of `held` must first be multiplied by it, and then lack `shift`."""
    shift: torch.Tensor | None = None
    """[C], whose product with the query is to be subtracted."""

    @property
    def whole(self) -> bool:
        """One block holds all rows."""
        return len(self.held) == sum(self.counts)

    def passes(self, own: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """One pass over all key rows: (index of the first row in the pool, block [k, C], its gradient or None).

        Args:
            own: Where the gradient of this rank's keys is added up, [counts[rank], C]. If it is given, the caller adds
                to each block's gradient, and when the pass is over the sum over all ranks has been added to `own`.

        Collective under `ring`, and under `gather` with a gradient. Under `ring` the next block is under way while
        the caller works on one; blocks come, and gradients are added, in the same order every time.
        """
        pool = self.pool
        if pool.ranks == 1:
            yield 0, self.held, own
        elif pool.exchange == "gather":
            gradient = None if own is None else own.new_zeros(self.held.shape)
            yield 0, self.held, gradient
            if own is not None and gradient is not None:
                pool.bring_home(gradient, self.counts, own)
        else:
            yield from self._round(own)

    def _round(self, own: torch.Tensor | None) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        pool, block = self.pool, self.held
        arriving = None
        arrival: list[dist.Work] = []
        for step in range(pool.ranks):
            owner, next_owner = ((pool.rank - step - shift) % pool.ranks for shift in (0, 1))
            following = block.new_empty((self.counts[next_owner], block.shape[1]))
            transfer = pool.pass_on(block, following) if step < pool.ranks - 1 else []
            gradient = None if own is None else own.new_zeros(block.shape)
            yield sum(self.counts[:owner]), block.to(self.dtype), gradient
            if gradient is not None:
                _wait(arrival)
                if arriving is not None:
                    gradient += arriving
                arriving = gradient.new_empty(following.shape)
                leaving = gradient
                arrival = pool.pass_on(leaving, arriving)
            _wait(transfer)
            block = following
        if own is not None and arriving is not None:
            _wait(arrival)
            own += arriving


@phase("exchange")
def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
