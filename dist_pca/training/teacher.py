"""The mean teacher: the moving average of the student's weights, without a network of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_pca.model.batch_norm import running_statistics
from dist_pca.training.ema import EMAShards
from dist_pca.training.zero import swapped_parameters


@contextmanager
def teacher_weights(engine: Any, ema: EMAShards) -> Iterator[None]:
    """Run the engine's network as the teacher while the context is open (Tarvainen and Valpola, 2017). Collective.

    The network is in evaluation mode with the averaged weights and running statistics: no dropout and no drop path, and
    an image's outputs do not depend on the rest of its batch. No gradients are recorded.

    Args:
        engine: DeepSpeed's, in training mode.
        ema: The moving average of its weights.
    """
    statistics = running_statistics(engine.module)
    own = {name: value.clone() for name, value in statistics.items()}
    with torch.no_grad(), swapped_parameters(engine, ema.partitions):
        for name, value in statistics.items():
            value.copy_(ema.statistics[name])
        engine.eval()
        yield
        engine.train()
        for name, value in statistics.items():
            value.copy_(own[name])
