from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.data.source import Sampler, build_sampler
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest, Shard
from tests.support.shards import CLASSES, data_config

COUNTS = [[900, 90, 0], [800, 0, 10], [700, 0, 0], [500, 100, 0], [1000, 0, 0], [900, 0, 0]]


def manifest(counts: Sequence[Sequence[int]], shards: int = 2) -> Manifest:
    size = -(-len(counts) // shards)
    parts = [counts[start : start + size] for start in range(0, len(counts), size)]
    return Manifest(
        Path("shards"), "test", 1, "all", True, CLASSES, tuple(_shard(n, rows) for n, rows in enumerate(parts))
    )


def _shard(number: int, rows: Sequence[Sequence[int]]) -> Shard:
    count = len(rows)
    keys = [f"{number}-{index}" for index in range(count)]
    columns = ([0] * count, [1] * count, [24] * count, [40] * count)
    return Shard(f"shard-{number:06d}.tar", 1, "", keys, *columns, [list(row) for row in rows])


def sampler(counts: Sequence[Sequence[int]] = COUNTS, seed: int = 5, **sampling: Any) -> Sampler:
    config = data_config(sampling={"source": "rare_class", "min_pixels": 5, **sampling})
    return build_sampler(config, [manifest(counts)], "source", seed)


def rows(sampler: Sampler, indices: range) -> list[list[int]]:
    offsets = [sampler.select(index).offset for index in indices]
    return [sampler.manifests[offset.folder].shards[offset.shard].pixel_counts[offset.sample] for offset in offsets]


def test_a_sample_shows_the_class_that_it_was_drawn_for() -> None:
    rare = sampler(temperature=0.5)
    for index in range(500):
        wanted = rare.select(index).wanted
        assert wanted is not None
        assert rows(rare, range(index, index + 1))[0][wanted] >= 5


def test_classes_are_drawn_by_the_softmax_of_their_rarity() -> None:
    rare = sampler(temperature=0.5)
    drawn = Counter(rare.select(index).wanted for index in range(6000))
    share = np.sum(COUNTS, axis=0) / np.sum(COUNTS)
    expected = np.exp((1 - share) / 0.5)
    for wanted, probability in enumerate(expected / expected.sum()):
        assert abs(drawn[wanted] / 6000 - probability) < 0.03


def test_among_samples_that_show_a_class_each_is_drawn_equally_often() -> None:
    rare = sampler(temperature=0.5)
    showing_sky = [rows(rare, range(p, p + 1))[0] for p in range(6000) if rare.select(p).wanted == 1]
    assert 0.45 < sum(row[1] == 90 for row in showing_sky) / len(showing_sky) < 0.55


def test_a_class_that_no_sample_shows_is_never_drawn() -> None:
    rare = sampler(min_pixels=50, temperature=0.001)
    assert {rare.select(index).wanted for index in range(200)} == {1}


def test_draws_are_a_function_of_seed_and_sample_index() -> None:
    drawn = [[sampler(seed=seed).select(index) for index in range(50)] for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_no_sample_shows_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.sampling\.min_pixels: no sample .* has 2000 pixels .* at most 1000$"):
        sampler(min_pixels=2000)


def test_chosen_classes_count_alone_and_in_their_order() -> None:
    config = data_config(
        classes=("car", "road"), sampling={"source": "rare_class", "min_pixels": 5, "temperature": 0.01}
    )
    rare = build_sampler(config, [manifest(COUNTS)], "source", 0)
    assert {rare.select(index).wanted for index in range(50)} == {0}
    assert rows(rare, range(50)) == [COUNTS[1]] * 50


def test_the_target_is_taken_in_plain_order() -> None:
    config = data_config(sampling={"source": "rare_class"})
    target = build_sampler(config, [replace(manifest(COUNTS), labelled=False)], "target", 5)
    assert sorted(rows(target, range(6))) == sorted(COUNTS)


pixels = st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=9)


@given(pixels, pixels, st.integers(1, 8), st.integers(0, 1000))
def test_pairing_takes_the_same_samples_in_each_window(
    sources: list[list[int]], targets: list[list[int]], window: int, number: int
) -> None:
    config = data_config(sampling={"pairing_window": window})
    paired = build_sampler(config, [manifest(sources)], "source", 1, targets=[manifest(targets)])
    plain = build_sampler(data_config(), [manifest(sources)], "source", 1)
    indices = range(number * window, (number + 1) * window)
    assert sorted(paired.select(index).offset for index in indices) == sorted(
        plain.select(index).offset for index in indices
    )


def test_paired_images_share_more_of_their_classes() -> None:
    generator = np.random.default_rng(0)
    sources, targets = ((generator.dirichlet([0.3] * 3, 64) * 1000).astype(int).tolist() for _ in range(2))
    plain = build_sampler(data_config(), [manifest(sources)], "source", 1)
    config = data_config(sampling={"pairing_window": 16})
    paired = build_sampler(config, [manifest(sources)], "source", 1, targets=[manifest(targets)])
    target = build_sampler(config, [manifest(targets)], "target", 1)

    def overlap(source: Sampler) -> float:
        pairs = zip(rows(source, range(64)), rows(target, range(64)), strict=True)
        return float(np.mean([np.minimum(one, other).sum() / 1000 for one, other in pairs]))

    assert overlap(paired) > overlap(plain) + 0.2


def test_pairing_with_an_unlabelled_target_is_refused() -> None:
    config = data_config(sampling={"pairing_window": 4})
    unlabelled = replace(manifest(COUNTS), labelled=False)
    with pytest.raises(UserError, match=r"^data\.sampling\.pairing_window: shards has no class counts"):
        build_sampler(config, [manifest(COUNTS)], "source", 0, targets=[unlabelled])


def test_replacements_are_samples_of_the_same_folder_and_differ() -> None:
    config = data_config(source=({"shards": "a", "weight": 1}, {"shards": "b", "weight": 1}))
    mixed = build_sampler(config, [manifest(COUNTS), manifest(COUNTS[:2])], "source", 0)
    for index in range(20):
        folder = mixed.select(index).offset.folder
        replaced = [mixed.fallback(index, attempt) for attempt in range(1, 20)]
        assert {offset.folder for offset in replaced} == {folder}
        assert len(set(replaced)) > 1
        assert replaced == [mixed.fallback(index, attempt) for attempt in range(1, 20)]
