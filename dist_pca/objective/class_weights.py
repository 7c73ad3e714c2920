"""Weights of classes in the cross-entropy: given, or from how often each class occurs in the source."""

from collections.abc import Iterable, Sequence

import numpy as np

from dist_pca.classes import ClassInfo
from dist_pca.config.objective import CrossEntropyConfig
from dist_pca.data.randomness import Indices
from dist_pca.errors import UserError, nearest

_KEY = "objective.cross_entropy.class_weights"
_SMOOTHING = 1.02
"""Constant of ENet, which bounds weights by 1 / ln(1.02), about 50."""


def class_weights(
    config: CrossEntropyConfig, counts: Iterable[Indices], classes: Sequence[ClassInfo]
) -> tuple[float, ...] | None:
    """Compute the weight of each class, scaled to a mean of 1; None if all are equal because none are asked for.

    Args:
        config: Weights, or the rule for them.
        counts: Pixels by sample and class of each source folder, [samples, K].
        classes: Classes by train id.

    Raises:
        UserError: there are not as many weights as classes, a class is unknown, or all weights are 0.
    """
    wanted, names = config.class_weights, [info.name for info in classes]
    if wanted is None:
        return None
    if isinstance(wanted, str):
        weights = _from_frequencies(wanted, np.concatenate(list(counts)))
    elif isinstance(wanted, dict):
        if unknown := sorted(wanted.keys() - set(names)):
            raise UserError(f"{_KEY}: no class {unknown[0]!r}; the nearest is {nearest(unknown[0], names)}")
        weights = np.array([wanted.get(name, 1.0) for name in names])
    else:
        if len(wanted) != len(names):
            raise UserError(f"{_KEY}: {len(wanted)} weights for {len(names)} classes; give one for each, or a map")
        weights = np.array(wanted)
    if weights.sum() == 0:
        raise UserError(f"{_KEY}: every weight is 0; give at least one class more")
    return tuple(float(weight) for weight in weights / weights.mean())


def _from_frequencies(rule: str, counts: Indices) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    pixels = counts.sum(axis=0)
    occurs = pixels > 0
    if rule == "inverse_log":
        return np.asarray(1 / np.log(_SMOOTHING + pixels / max(1, pixels.sum())))
    # Frequency of a class: its share of the pixels of images in which it occurs.
    in_images = (counts.sum(axis=1, keepdims=True) * (counts > 0)).sum(axis=0)
    frequencies = pixels[occurs] / in_images[occurs]
    weights = np.ones(len(pixels))
    weights[occurs] = np.median(frequencies) / frequencies
    return weights
