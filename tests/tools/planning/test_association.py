"""Memory of the association is predicted from its buffers; here it is measured on real ranks."""

from pathlib import Path

import pytest
import torch

from dist_pca.association import cycle_association
from dist_pca.config import AssociationConfig, Level
from dist_pca.objective.lovasz import lovasz_softmax
from dist_pca.tools.planning import association, lovasz
from dist_pca.tools.planning.association import Candidates
from dist_pca.tools.planning.live import LiveBytes
from tests.support.ranks import run_on_ranks

CLASSES = 7
SOURCE, TARGET, CHANNELS = 3000, 2600, 96


def counted_with_guide(rank: int, world_size: int, configs: list[AssociationConfig]) -> list[int]:
    """Bytes that the association counts where other pixels choose the matches."""
    source, target, *guide = (torch.randn(count, CHANNELS) for count in (300, 260, 300, 260))
    return [
        int(
            cycle_association(
                source.requires_grad_(),
                target.requires_grad_(),
                torch.arange(300) % CLASSES,
                num_classes=CLASSES,
                communication=config.communication,
                guide=(guide[0], guide[1]),
                guide_keys=config.teacher_keys,
            ).communication_bytes
        )
        for config in configs
    ]


def measured_association(rank: int, world_size: int, level: Level, communication: str) -> list[int]:
    """Bytes at the peaks of forward and backward, and between them, beyond what is given in and comes out."""
    torch.manual_seed(rank)
    channels = CHANNELS if level == "features" else CLASSES
    centres = torch.randn(CLASSES, channels, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (SOURCE,))
    source = centres[labels] + torch.randn(SOURCE, channels)
    target = centres[torch.randint(CLASSES, (TARGET,))] + torch.randn(TARGET, channels)
    if level == "predictions":
        source, target = source.softmax(dim=1), target.softmax(dim=1)
    source.requires_grad_()
    target.requires_grad_()
    with LiveBytes() as live:
        live.count([source, target, labels])
        given = live.bytes
        live.begin("forward")
        loss = cycle_association(
            source,
            target,
            labels,
            similarity="cosine" if level == "features" else "kl",
            num_classes=CLASSES,
            communication=communication,  # type: ignore[arg-type]
        ).loss
        saved = live.bytes - given
        live.begin("backward")
        loss.backward()
    gradients = 4 * channels * (SOURCE + TARGET)
    return [live.peaks["forward"] - given, saved, live.peaks["backward"] - given - gradients]


def measured_lovasz(rank: int, world_size: int, pixels: int, bins: int | None) -> list[int]:
    torch.manual_seed(rank)
    probabilities = torch.randn(pixels, CLASSES).softmax(dim=1).requires_grad_()
    labels = torch.arange(pixels) % CLASSES
    with LiveBytes() as live:
        # The sorted errors are those of copies, without the pixels that are left out.
        live.count([probabilities, labels] if bins else [])
        given = live.bytes
        live.begin("forward")
        loss = lovasz_softmax(probabilities, labels, bins=bins)
        saved = live.bytes
        live.begin("backward")
        loss.backward()
    gradient = 4 * pixels * CLASSES
    return [live.peaks["forward"] - given, saved - given, live.peaks["backward"] - given - gradient]


def predicted_association(level: Level, communication: str, world_size: int) -> list[float]:
    channels = CHANNELS if level == "features" else CLASSES
    candidates = Candidates(SOURCE, TARGET, channels, CLASSES, world_size, 1)
    config = AssociationConfig(communication="gather" if communication == "gather" else "ring")
    return list(association.memory(config, level, candidates, "cpu")[1:2])


@pytest.mark.parametrize("level", ["features", "predictions"])
def test_the_association_of_one_rank_takes_at_most_what_is_predicted(level: Level) -> None:
    peak, _, _ = measured_association(0, 1, level, "local")
    (predicted,) = predicted_association(level, "local", 1)
    assert 0.55 * predicted < peak <= 1.1 * predicted


@pytest.mark.slow
@pytest.mark.parametrize("communication", ["ring", pytest.param("gather", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("level", ["features", pytest.param("predictions", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_the_association_over_ranks_takes_what_is_predicted(
    level: Level, communication: str, world_size: int, tmp_path: Path
) -> None:
    peak, _, _ = run_on_ranks(measured_association, world_size, tmp_path, level, communication)[0]
    assert predicted_association(level, communication, world_size) == [pytest.approx(peak, rel=0.15)]


@pytest.mark.slow
def test_bytes_sent_where_a_teacher_chooses_matches_are_those_counted(tmp_path: Path) -> None:
    configs = [
        AssociationConfig(communication="gather" if gathers else "ring", teacher_matches=True, teacher_keys=keys)
        for gathers in (True, False)
        for keys in (True, False)
    ]
    candidates = Candidates(300, 260, CHANNELS, CLASSES, 3, 1)
    counted = run_on_ranks(counted_with_guide, 3, tmp_path, configs)[0]
    assert [association.sent_bytes(config, candidates, "cpu") for config in configs] == pytest.approx(
        counted, rel=0.001
    )


@pytest.mark.parametrize("bins", [None, 16, 2**16])
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_lovasz_takes_what_is_predicted(world_size: int, bins: int | None, tmp_path: Path) -> None:
    pixels = 40_000 if bins is None else 100_000
    forward, saved, backward = (
        measured_lovasz(0, 1, pixels, bins)
        if world_size == 1
        else run_on_ranks(measured_lovasz, world_size, tmp_path, pixels, bins)[0]
    )
    predicted = lovasz.memory(pixels, CLASSES, world_size, bins, "cpu")
    assert predicted == (
        pytest.approx(saved, rel=0.15),
        pytest.approx(forward, rel=0.15),
        pytest.approx(backward, rel=0.15),
    )
