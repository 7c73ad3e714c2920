"""Bytes of tensors that are alive, and bytes that collectives send, operation by operation."""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is open, every storage that an operation allocates, until the last tensor on it is gone.

    Real tensors and fake ones alike, but none on the meta device; in forward and backward passes and optimiser steps of
    this thread. What an operation allocates and frees within itself is not seen. It also counts the bytes that this
    rank sends in collectives over all ranks, as a ring algorithm sends them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        """Bytes currently allocated."""
        self.phase = ""
        self.peaks: defaultdict[str, int] = defaultdict(int)
        """Peak of allocated bytes in each phase."""
        self.sent: defaultdict[str, float] = defaultdict(float)
        """Bytes sent to other ranks in each phase."""
        self._known: dict[int, weakref.finalize[..., Any]] = {}

    def begin(self, phase: str) -> None:
        """What follows is of this phase."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.bytes)

    def count(self, values: Iterable[object]) -> None:
        """Count tensors among the values that are not yet known."""
        for value in values:
            if not isinstance(value, torch.Tensor) or value.device.type == "meta":
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                size = storage.nbytes()
                self.bytes += size
                self.peaks[self.phase] = max(self.peaks[self.phase], self.bytes)
                self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.bytes -= size
        del self._known[key]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the operation happen, and count what it gives and sends."""
        if function.namespace == "c10d":
            self.sent[self.phase] += _ring_bytes(function.name().removeprefix("c10d::").rstrip("_"), args)
        result = function(*args, **(kwargs or {}))
        self.count(tree_leaves(result))
        return result


def _ring_bytes(name: str, args: Any) -> float:
    ranks = dist.get_world_size()
    others = ranks - 1
    if name == "allreduce":
        return 2 * others / ranks * _size(args[0])
    if name in ("allgather", "_allgather_base"):
        return others * _size(args[1])
    if name in ("reduce_scatter", "_reduce_scatter_base", "alltoall_base"):
        return others / ranks * _size(args[1])
    if name == "send":
        return _size(args[0])
    if name == "broadcast":
        return others / ranks * _size(args[0])
    if name == "gather":
        return _size(args[1])
    assert name in ("barrier", "recv"), name
    return 0.0


def _size(values: Any) -> int:
    return sum(value.nbytes for value in tree_leaves(values) if isinstance(value, torch.Tensor))
