"""Bytes of tensors that are alive, operation by operation."""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open, counts every storage that an operation gives out, until the last tensor on it is gone.

    Real tensors and fake ones alike, but none on the meta device; in forward and backward passes and optimiser steps of
    this thread. What an operation allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        """Alive now."""
        self.phase = ""
        self.peaks: defaultdict[str, int] = defaultdict(int)
        """Most that was alive in each phase."""
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
        """Let the operation happen and count what it gives."""
        result = function(*args, **(kwargs or {}))
        self.count(tree_leaves(result))
        return result
