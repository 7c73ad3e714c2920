"""What the student is shown follows from the config, and the teacher sees clean images."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dist_pca.config import RunConfig, load_config
from dist_pca.data.collate import Batch
from dist_pca.data.views import class_mask
from dist_pca.model.segmenter import Output, normalised
from dist_pca.resources import resource
from dist_pca.training.views import forward_views, student_views

CLASSES = 3
MEAN = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)


class Network:
    """Logits that tell each pixel's brightness, and a record of what was seen, and as whom."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, torch.Tensor]] = []
        self.role = "student"

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        self.role = "teacher"
        yield
        self.role = "student"

    def __call__(self, images: torch.Tensor) -> Output:
        self.seen.append((self.role, images))
        brightness = (images.float() / 255 if images.dtype == torch.uint8 else images).mean(dim=1, keepdim=True)
        logits = torch.cat([4 * brightness, 2 + 0 * brightness, 0 * brightness], dim=1)
        return Output(logits, brightness)


def batch(seed: int, first: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (2, 8, 12), dtype=torch.uint8, generator=generator)
    return Batch(images, labels, ["a", "b"], [first, first + 1], [])


def run_config(*overrides: str) -> RunConfig:
    settings = (
        *("model.running_statistics=all", "data.photometric.probability=0", "data.photometric.blur_probability=0"),
        *(f"objective.association.teacher_{part}=false" for part in ("check", "weight", "matches")),
        *("objective.association.weight=0", "objective.smoothness.weight=0", "objective.self_training.weight=0"),
        *("objective.masked_consistency.weight=0", "training.ema_decay=0.9"),
        *("objective.self_training.start_step=0", "objective.association.start_step=0"),
    )
    return load_config(resource("configs", "demo"), [*settings, *overrides])


@pytest.mark.parametrize(
    ("overrides", "shown", "taught"),
    [
        (("objective.smoothness.weight=0.01",), {"source", "target"}, 0),
        (("objective.self_training.weight=1",), {"source", "mixed"}, 1),
        (("objective.self_training.weight=1", "objective.smoothness.weight=0.01"), {"source", "target", "mixed"}, 1),
        (("objective.masked_consistency.weight=1",), {"source", "masked"}, 1),
        (("objective.self_training.weight=1", "model.running_statistics=target"), {"source", "target", "mixed"}, 1),
        (("objective.association.weight=0.1", "objective.association.teacher_check=true"), {"source", "target"}, 1),
        (("objective.association.weight=0.1", "objective.association.teacher_matches=true"), {"source", "target"}, 2),
    ],
)
def test_only_what_a_term_needs_is_shown(overrides: tuple[str, ...], shown: set[str], taught: int) -> None:
    network = Network()
    views = student_views(
        run_config(*overrides), batch(0, 0), batch(1, 5), network, network.as_teacher, mean=MEAN, step=0
    )
    assert {name for name, view in zip(views._fields, views, strict=True) if view is not None} == shown
    assert [role for role, _ in network.seen] == ["teacher"] * taught
    domains = forward_views(network, views, joint=True)
    assert {name for name, domain in zip(domains._fields, domains, strict=True) if domain is not None} == shown


@pytest.mark.parametrize(
    ("step", "shown", "taught"),
    [
        (0, {"source", "target"}, 0),
        (9, {"source", "target"}, 0),
        (10, {"source", "target"}, 2),
        (19, {"source", "target"}, 2),
        (20, {"source", "target", "mixed", "masked"}, 2),
    ],
)
def test_teacher_passes_and_views_start_with_the_first_term_that_needs_them(
    step: int, shown: set[str], taught: int
) -> None:
    network = Network()
    config = run_config(
        *("objective.association.weight=0.1", "objective.association.teacher_matches=true"),
        *("objective.association.start_step=10", "objective.self_training.start_step=20"),
        *("objective.self_training.weight=1", "objective.masked_consistency.weight=1"),
    )
    views = student_views(config, batch(0, 0), batch(1, 5), network, network.as_teacher, mean=MEAN, step=step)
    assert {name for name, view in zip(views._fields, views, strict=True) if view is not None} == shown
    assert len(network.seen) == taught


def test_the_teacher_sees_the_target_in_its_own_colours_and_the_student_changed_ones() -> None:
    network, target = Network(), batch(1, 5)
    config = run_config("objective.masked_consistency.weight=1", "data.photometric.probability=1.0")
    views = student_views(config, batch(0, 0), target, network, network.as_teacher, mean=MEAN, step=0)
    assert network.seen[0][1] is target.images
    assert views.masked is not None
    visible = (views.masked.images != MEAN).any(dim=1)
    assert (views.masked.images - target.images / 255).abs().amax(dim=1)[visible].max() > 0.01


@pytest.mark.parametrize("changed", [0, 1])
def test_hidden_blocks_are_zero_after_normalisation_and_others_are_the_target(changed: int) -> None:
    network, target = Network(), batch(1, 5)
    block = ("objective.masked_consistency.block=2", "objective.smoothness.weight=0.1")
    config = run_config("objective.masked_consistency.weight=1", *block, f"data.photometric.probability={changed}")
    views = student_views(config, batch(0, 0), target, network, network.as_teacher, mean=MEAN, step=0)
    assert views.masked is not None
    assert views.target is not None
    hidden = (normalised(views.masked.images, MEAN, torch.ones(3, 1, 1)) == 0).all(dim=1)
    assert 0.4 < hidden.float().mean() < 1
    shown = normalised(views.target.images, MEAN, torch.ones(3, 1, 1))
    seen = normalised(views.masked.images, MEAN, torch.ones(3, 1, 1))
    assert torch.equal(seen, torch.where(hidden[:, None], 0, shown))


def test_crops_lose_the_pseudo_labels_of_the_ignored_columns_that_they_show() -> None:
    network = Network()
    config = run_config("objective.masked_consistency.weight=1", "objective.self_training.ignore_sides=0.25")
    # Crops of 12 out of 24 columns, of which six at each side are ignored.
    target = batch(1, 5)._replace(beside=[(0, 12), (6, 6)])
    views = student_views(config, batch(0, 0), target, network, network.as_teacher, mean=MEAN, step=0)
    masked = forward_views(network, views, joint=False).masked
    assert masked is not None
    assert masked.labels is not None
    ignored = [(labels[0] == 255).nonzero().flatten().tolist() for labels in masked.labels]
    assert ignored == [[0, 1, 2, 3, 4, 5], []]


def test_mixed_images_show_pasted_source_classes_with_their_labels_and_else_the_target_with_pseudo_labels() -> None:
    network, source, target = Network(), batch(0, 0), batch(1, 5)
    config = run_config("objective.self_training.weight=1", "objective.self_training.threshold=0.9")
    mixed = forward_views(
        network, student_views(config, source, target, network, network.as_teacher, mean=MEAN, step=0), joint=False
    ).mixed
    assert mixed is not None
    assert source.labels is not None
    pasted = class_mask(source.labels, target.indices, seed=config.seed)
    taught = Network()(target.images).logits.softmax(dim=1)
    assert torch.equal(mixed.trusted, pasted)  # type: ignore[arg-type]
    assert torch.equal(mixed.labels, torch.where(pasted, source.labels.long(), taught.argmax(dim=1)))  # type: ignore[arg-type]
    assert torch.equal(mixed.confident, taught.amax(dim=1) >= 0.9)  # type: ignore[arg-type]
    assert torch.equal(mixed.truth, target.labels)  # type: ignore[arg-type]
    expected = torch.where(pasted[:, None], source.images, target.images)
    assert torch.equal(network.seen[-1][1], expected)


def test_one_batch_and_passes_in_turn_give_every_view_the_same_outputs() -> None:
    network = Network()
    config = run_config("objective.self_training.weight=1", "objective.smoothness.weight=0.1")
    views = student_views(config, batch(0, 0), batch(1, 5), network, network.as_teacher, mean=MEAN, step=0)
    for together, alone in zip(
        forward_views(network, views, joint=True), forward_views(network, views, joint=False), strict=True
    ):
        assert (together is None) == (alone is None)
        if together is not None and alone is not None:
            assert torch.equal(together.logits, alone.logits)
            assert torch.equal(together.features, alone.features)


@pytest.mark.parametrize(
    ("overrides", "tracked"),
    [
        (("objective.self_training.weight=1", "objective.smoothness.weight=0.1"), 1),
        (("objective.self_training.weight=1", "objective.masked_consistency.weight=1"), 1),
        (("objective.masked_consistency.weight=1", "model.running_statistics=all"), 1),
        (("objective.smoothness.weight=0.1",), 1),
    ],
)
def test_statistics_move_in_the_pass_alone_that_shows_most_of_the_target(
    overrides: tuple[str, ...], tracked: int
) -> None:
    network, kept = Network(), []

    @contextmanager
    def keep() -> Iterator[None]:
        kept.append(len(network.seen))
        yield

    views = student_views(
        run_config(*overrides), batch(0, 0), batch(1, 5), network, network.as_teacher, mean=MEAN, step=0
    )
    network.seen.clear()
    forward_views(network, views, joint=False, keep_statistics=keep)
    assert kept == [index for index in range(len(network.seen)) if index != tracked]
