"""Choice among trained networks without target labels: by two scores on unlabelled target images, and two guards.

Information: entropy of the mean class probabilities less the mean entropy of each pixel's, which is the mutual
information of pixels and classes (information maximisation: Shi and Sha, ICML 2012). High where pixels are decided and
classes are many. Agreement: how often a candidate's arg max is that of the average of all candidates' class
probabilities (EnsV: Hu et al., NeurIPS 2024).
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dist_pca.config import RunConfig, load_config
from dist_pca.data.decode import Pixels
from dist_pca.data.stream import evaluation_stream
from dist_pca.errors import UserError
from dist_pca.evaluation.confusion import confusion_matrix
from dist_pca.evaluation.load import load_run
from dist_pca.evaluation.views import view_logits
from dist_pca.model.segmenter import backbone_options
from dist_pca.shards.manifest import Manifest, Shard
from dist_pca.training.checkpoint import latest_checkpoint, read_step, whole_checkpoints
from dist_pca.training.run_folder import read_classes

Rule = Literal["information", "agreement"]

MAJORITY = 3
"""Fewest candidates whose ensemble says more than each of them."""
PREDICTED_SHARE = 0.001
"""Share of pixels on which a class must be predicted to count as predicted."""
COMMON_SHARE = 0.01
"""Share of pixels on which the median candidate must predict a class for another one to have lost it."""
COLLAPSED_SHARE = 0.5
"""Share of the reference's number of classes, or entropy, at or below which a candidate has collapsed."""
GRID_STRIDE = 4
"""Pixels of an image to one of the common grid on which predictions are compared."""
CHUNK_BYTES = 2**30
"""Images, probabilities and predictions held at once."""


class Candidate(NamedTuple):
    """One checkpoint of a run."""

    run: Path
    checkpoint: Path

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return read_step(self.checkpoint)


class Measured(NamedTuple):
    """What a candidate predicts on the target."""

    information: float
    """Mutual information of pixels and classes, nats, 0 to log K."""
    agreement: float
    """Share of pixels on which its arg max is the ensemble's."""
    histogram: torch.Tensor
    """Pixels predicted as each class, int64, K."""
    finite: bool = True
    """Whether its outputs are finite on every image."""


class Measurement(NamedTuple):
    """What all candidates predict on the target."""

    candidates: list[Measured]
    ensemble: torch.Tensor
    """Pixels that the ensemble predicts as each class, int64, K."""


def find_candidates(runs: Sequence[Path], *, all_checkpoints: bool) -> list[Candidate]:
    """The newest checkpoint of each run, or all of them, known to have the same classes.

    Raises:
        UserError: a folder is not a run or has no checkpoint, classes differ, or there is nothing to choose from.
    """
    candidates, tables = [], {}
    for run in dict.fromkeys(runs):
        if not (run / "config.yaml").is_file() or not (run / "classes.json").is_file():
            raise UserError(f"{run}: not a run folder (no config.yaml or classes.json); give folders of trained runs")
        newest = latest_checkpoint(run / "checkpoints")
        if newest is None:
            raise UserError(f"{run}: has no checkpoint yet; train it first, or leave it out")
        whole = whole_checkpoints(run / "checkpoints")
        candidates += [Candidate(run, checkpoint) for checkpoint in (whole if all_checkpoints else [newest])]
        tables[run] = read_classes(run)
    (first, table), *others = tables.items()
    for other, its in others:
        names = ((info.name for info in classes) for classes in (table, its))
        for index, (ours, theirs) in enumerate(zip_longest(*names)):
            if ours != theirs:
                raise UserError(
                    f"{other}: has other classes than {first}, first at train id {index}: {theirs or 'none'} where "
                    f"{first} has {ours or 'none'}; choose among runs of the same data.classes"
                )
    if len(candidates) < 2:
        raise UserError(
            f"{first}: there is nothing to choose from a single candidate; name more runs, or take all of its "
            "checkpoints with --all-checkpoints"
        )
    return candidates


def spread(manifest: Manifest, most: int | None) -> Manifest:
    """At most this many samples of a shard folder, evenly spread in the manifest's order; None takes all."""
    if most is None or most >= manifest.samples:
        return manifest
    wanted = {place * manifest.samples // most for place in range(most)}
    shards, first = [], 0
    for shard in manifest.shards:
        here = [sample for sample in range(len(shard.keys)) if first + sample in wanted]
        first += len(shard.keys)
        shards.append(_samples_of(shard, here))
    return replace(manifest, shards=tuple(shards))


def measure(
    candidates: Sequence[Candidate],
    target: Manifest,
    *,
    device: torch.device | str,
    progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Compare the candidates' predictions with those of their ensemble; labels of the target are never read.

    Images pass in chunks of bounded memory and candidates one after another, so that one network is held at a time.

    Args:
        candidates: Two or more of the same classes.
        target: The target's shards.
        device: Where networks run.
        progress: Called with the number of finished pairs of candidate and image.

    Raises:
        UserError: a run or image cannot be read, or there are no images.
    """
    if not target.samples:
        raise UserError(f"--target {target.location}: holds no images; name shards that do")
    config, classes = load_config(candidates[0].run / "config.yaml"), read_classes(candidates[0].run)
    number, done = len(classes), 0
    counts = torch.zeros(len(candidates), number, number, dtype=torch.int64)
    # Sums over pixels.
    class_sums = torch.zeros(len(candidates), number, dtype=torch.float64)
    entropy_sums = torch.zeros(len(candidates), dtype=torch.float64)
    finite = [True] * len(candidates)
    # Shards that say they have no labels are not asked for any.
    samples = evaluation_stream(
        replace(target, labelled=False),
        0,
        1,
        classes=classes,
        bands=backbone_options(config.model).bands,
        workers=config.data.workers,
        cache=config.data.cache,
    )
    with closing(samples):
        for images in _chunks((sample.image for sample in samples), number, len(candidates)):
            total = [torch.zeros(number, *_grid(image)) for image in images]
            predicted: list[list[torch.Tensor]] = []
            for place, candidate in enumerate(candidates):
                own_config, _, model = load_run(candidate.run, candidate.checkpoint.name)
                model.to(device)
                predicted.append([])
                for image, votes in zip(images, total, strict=True):
                    probabilities = class_probabilities(model, image, own_config, device).cpu()
                    if not bool(probabilities.isfinite().all()):
                        # It has no vote, as it would have every pixel's.
                        finite[place], probabilities = False, torch.zeros_like(probabilities)
                    class_sums[place] += probabilities.sum(dim=(1, 2))
                    entropy_sums[place] += torch.special.entr(probabilities).sum()
                    votes += probabilities
                    predicted[place].append(probabilities.argmax(dim=0).to(torch.uint8))
                    progress(done := done + 1)
            for place, labels in enumerate(predicted):
                for label, votes in zip(labels, total, strict=True):
                    counts[place] += confusion_matrix(label, votes.argmax(dim=0), number)
    pixels = int(counts[0].sum())
    information = torch.special.entr(class_sums / pixels).sum(dim=1) - entropy_sums / pixels
    agreement = counts.diagonal(dim1=1, dim2=2).sum(dim=1).double() / pixels
    measured = [
        Measured(*scores)
        for scores in zip(information.tolist(), agreement.tolist(), counts.sum(dim=1), finite, strict=True)
    ]
    return Measurement(measured, counts[0].sum(dim=1))


@torch.no_grad()
def class_probabilities(model: nn.Module, image: Pixels, config: RunConfig, device: torch.device | str) -> torch.Tensor:
    """Class probabilities of an image on the common grid, by the run's evaluation protocol, float32, K x h x w."""
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255
    views = view_logits(model, pixels, config.input_size(*image.shape[:2]), config.evaluation)
    total = torch.zeros((), device=device)
    for logits in views:
        resized = F.interpolate(logits, _grid(image), mode="bilinear", align_corners=False)
        total = total + resized[0].softmax(dim=0)
    return total / len(views)


def predicted_classes(histogram: torch.Tensor) -> int:
    """Number of classes predicted on at least `PREDICTED_SHARE` of the pixels of a histogram, K."""
    return int((histogram >= PREDICTED_SHARE * histogram.sum()).sum())


def histogram_entropy(histogram: torch.Tensor) -> float:
    """Entropy of a histogram of predicted classes, K, in nats."""
    return float(torch.special.entr(histogram.double() / histogram.sum()).sum())


def guard(
    measurement: Measurement, source_mean_iou: Sequence[float] | None, *, tolerance: float = 0.02
) -> list[list[str]]:
    """Why each candidate may not be chosen; an empty list where it may.

    Outputs: they are not finite on some image.
    Source: the mean IoU on labelled source shards is more than `tolerance` below the best candidate's.
    Collapse: at most half as many classes are predicted as by the reference, or the entropy of the histogram of
    predicted classes is at most half of the reference's. The reference is the ensemble or the candidates' median,
    whichever is larger, so that neither one confident candidate nor many collapsed ones set it alone.
    Loss of a class: one that the median candidate predicts on at least `COMMON_SHARE` of the pixels is predicted on
    less than `PREDICTED_SHARE`. Of few classes each is a large part of the mean IoU.

    Args:
        measurement: What the candidates predict.
        source_mean_iou: By candidate, in 0..1; None where there are no labelled source shards.
        tolerance: In 0..1.
    """
    reasons: list[list[str]] = [[] for _ in measurement.candidates]
    for place, value in enumerate(source_mean_iou or ()):
        best = max(source_mean_iou or ())
        if value < best - tolerance:
            reasons[place].append(f"source mIoU {100 * (best - value):.1f} below the best")
    for value_of, form in (
        (predicted_classes, "{:g} of {:g} classes"),
        (histogram_entropy, "entropy {:.2f} of {:.2f}"),
    ):
        values = [float(value_of(each.histogram)) for each in measurement.candidates]
        reference = max(float(value_of(measurement.ensemble)), statistics.median(values))
        for place, value in enumerate(values):
            if value <= COLLAPSED_SHARE * reference and value < reference:
                reasons[place].append(f"collapsed: {form.format(value, reference)}")
    shares = torch.stack([each.histogram.double() / each.histogram.sum() for each in measurement.candidates])
    lost = (shares < PREDICTED_SHARE) & (shares.median(dim=0).values >= COMMON_SHARE)
    for place, count in enumerate(lost.sum(dim=1).tolist()):
        if count and not reasons[place]:
            reasons[place].append(f"{count} class{'es' if count > 1 else ''} lost")
    for found, measured in zip(reasons, measurement.candidates, strict=True):
        if not measured.finite:
            found[:] = ["outputs are not finite"]
    return reasons


def choose(measurement: Measurement, reasons: Sequence[Sequence[str]], rule: Rule = "information") -> int:
    """Place of the candidate that the rule puts first among those that no guard keeps out; of equal ones the first.

    By information a candidate counts as much as it agrees with the ensemble, where three or more have a majority: a
    network that has seen no target can be decided on many classes, and wrong.

    Raises:
        UserError: all are out.
    """
    left = [place for place, out in enumerate(reasons) if not out]
    if not left:
        raise UserError("every candidate is kept out by a guard; raise --tolerance, or add candidates")
    voted = rule == "information" and len(measurement.candidates) >= MAJORITY

    def score(place: int) -> float:
        measured = measurement.candidates[place]
        return measured.information * measured.agreement if voted else getattr(measured, rule)

    return max(left, key=lambda place: (score(place), -place))


def _samples_of(shard: Shard, places: Sequence[int]) -> Shard:
    return replace(
        shard,
        keys=[shard.keys[place] for place in places],
        offsets=[shard.offsets[place] for place in places],
        lengths=[shard.lengths[place] for place in places],
        heights=[shard.heights[place] for place in places],
        widths=[shard.widths[place] for place in places],
        pixel_counts=[shard.pixel_counts[place] for place in places if shard.pixel_counts],
    )


def _grid(image: Pixels) -> tuple[int, int]:
    return -(-image.shape[0] // GRID_STRIDE), -(-image.shape[1] // GRID_STRIDE)


def _chunks(images: Iterator[Pixels], classes: int, candidates: int) -> Iterator[list[Pixels]]:
    chunk: list[Pixels] = []
    held = 0
    for image in images:
        height, width = _grid(image)
        needed = image.nbytes + height * width * (4 * classes + candidates)
        if chunk and held + needed > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(image)
        held += needed
    if chunk:
        yield chunk
