"""Drawn cycles are cycles of the batch, with each outcome among them, at the places of their pixels."""

import numpy as np
import torch

from dist_pca.config import AssociationConfig
from dist_pca.evaluation.cycle_picture import (
    BROKEN,
    CLOSED,
    LINES,
    OUTCOMES,
    count_outcomes,
    draw_cycles,
    image_names,
    sample_cycles,
)
from dist_pca.evaluation.cycles import JudgedCycles, judge
from tests.tools.matches.scenes import CAR, CLASSES, LOOKS, NONE, ROAD, SOURCE, TRUTH, random_domain, scene


def candidate_sets(scope: str, images: int = 3) -> list[JudgedCycles]:
    config = AssociationConfig.model_validate({"diffusion": 0.0, "scope": scope, "teacher_check": True})
    return judge(config, "features", *(random_domain(images, seed, teacher=True) for seed in (0, 1)))


def test_every_outcome_is_drawn_and_all_are_counted() -> None:
    (cycles,) = candidate_sets("world")
    drawn, counts = sample_cycles([cycles], seed=0), count_outcomes([cycles])
    assert counts == {
        "kept": int(cycles.kept.sum()),
        "refused by the teacher": int((cycles.consistent & ~cycles.kept).sum()),
        "not consistent": int((~cycles.consistent & (cycles.labels != NONE)).sum()),
    }
    assert sum(counts.values()) == int((cycles.labels != NONE).sum())
    for outcome in OUTCOMES:
        assert len([cycle for cycle in drawn if cycle.outcome == outcome]) == min(LINES, counts[outcome])
    assert {cycle.outcome for cycle in drawn} == set(OUTCOMES)
    for cycle in drawn:
        assert (cycle.target, cycle.end) == (int(cycles.targets[cycle.source]), int(cycles.ends[cycle.source]))
        assert cycle.label == int(cycles.labels[cycle.source])
        assert (cycle.label == cycle.end_label) == (cycle.outcome != "not consistent")
        assert cycle.truth == int(cycles.target_labels[cycle.target])


def test_cycles_of_pairs_stay_in_the_images_of_their_pair() -> None:
    pairs = candidate_sets("pair")
    size = len(pairs[0].labels)
    drawn = sample_cycles(pairs, seed=0)
    assert {cycle.source // size for cycle in drawn} == {0, 1, 2}
    for cycle in drawn:
        image = cycle.source // size
        assert cycle.target // len(pairs[0].target_labels) == cycle.end // size == image
        assert cycle.truth == int(pairs[image].target_labels[cycle.target % size])


def test_a_target_without_labels_gives_the_same_cycles_without_a_true_class() -> None:
    source, target = scene(SOURCE, SOURCE), scene(LOOKS, TRUTH)
    config = AssociationConfig(diffusion=0)
    (known,) = judge(config, "features", source, target)
    (unknown,) = judge(config, "features", source, target._replace(labels=None))
    assert torch.equal(unknown.kept, known.kept)
    assert torch.equal(unknown.targets, known.targets)
    assert set(unknown.target_labels.tolist()) == {NONE}
    assert {cycle.truth for cycle in sample_cycles([unknown], seed=0)} == {NONE}


def test_a_consistent_cycle_is_drawn_in_one_colour_and_a_broken_one_in_the_other() -> None:
    (cycles,) = judge(AssociationConfig(diffusion=0), "features", scene(SOURCE, SOURCE), scene(LOOKS, TRUTH))
    images = [np.zeros((1, 40, 60, 3), np.uint8)] * 2
    drawn = sample_cycles([cycles], seed=0)
    found = {}
    for outcome, color in (("kept", CLOSED), ("not consistent", BROKEN)):
        own = [cycle for cycle in drawn if cycle.outcome == outcome]
        picture = np.asarray(draw_cycles(images, ((4, 4), (4, 4)), own, CLASSES, [["a"], ["b"]])).astype(int)
        near = [int((np.abs(picture - each).sum(axis=2) < 30).sum()) for each in (CLOSED, BROKEN)]
        found[color] = near
    assert found[CLOSED][0] > 500 > found[CLOSED][1]
    assert found[BROKEN][1] > 100 > found[BROKEN][0]
    assert {cycle.label for cycle in drawn if cycle.outcome == "not consistent"} == {CAR}
    assert all(cycle.end_label == ROAD for cycle in drawn if cycle.outcome == "not consistent")


def test_images_are_named_by_rank_where_they_are_divided_evenly() -> None:
    assert image_names(4, 2) == ["image 1 on rank 0", "image 2 on rank 0", "image 3 on rank 1", "image 4 on rank 1"]
    assert image_names(3, 2) == ["image 1", "image 2", "image 3"]
    assert image_names(2, 1) == ["image 1", "image 2"]
