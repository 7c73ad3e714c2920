import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dist_pca.data.randomness import Domain
from dist_pca.data.source import Order, micro_batch_indices, micro_batch_size
from dist_pca.errors import UserError

counts_of_shards = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any).map(tuple)
orders = st.builds(
    Order, counts_of_shards, st.integers(0, 2**64), st.sampled_from(["source", "target"]), st.integers(1, 9)
)
divisions = st.tuples(st.integers(1, 6), st.integers(1, 4))


def everything(order: Order) -> set[tuple[int, int]]:
    return {(shard, sample) for shard, count in enumerate(order.counts) for sample in range(count)}


@given(orders, st.integers(0, 2**40))
def test_every_epoch_takes_every_sample_once(order: Order, epoch: int) -> None:
    taken = [order.locate(epoch * order.samples + offset) for offset in range(order.samples)]
    assert len(taken) == order.samples
    assert set(taken) == everything(order)


@given(orders, st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
def test_an_index_holds_the_same_sample_however_it_is_reached(order: Order, indices: list[int]) -> None:
    fresh = Order(order.counts, order.seed, order.domain, order.window)
    backwards = [fresh.locate(index) for index in reversed(indices)]
    assert [order.locate(index) for index in indices] == backwards[::-1]


@given(orders, st.integers(0, 100))
def test_reads_stay_inside_one_window_of_shards_at_a_time(order: Order, epoch: int) -> None:
    shards = [order.locate(epoch * order.samples + offset)[0] for offset in range(order.samples)]
    last = {shard: offset for offset, shard in enumerate(shards)}
    first = {shard: shards.index(shard) for shard in last}
    for offset in range(order.samples):
        assert sum(first[shard] <= offset <= last[shard] for shard in last) <= order.window


def test_epochs_seeds_and_domains_are_shuffled_differently() -> None:
    streams: list[tuple[int, Domain]] = [(0, "source"), (1, "source"), (0, "target")]
    orders = [Order((50, 50), seed, domain, 2) for seed, domain in streams]
    sequences = [[order.locate(offset) for offset in range(100)] for order in orders]
    sequences.append([orders[0].locate(100 + offset) for offset in range(100)])
    sequences.append(sorted(sequences[0]))
    assert all(one != other for one, other in pairwise(sorted(sequences)))


def test_every_sample_comes_first_equally_often() -> None:
    first = Counter(Order((1, 2, 3), seed, "source", 3).locate(0) for seed in range(3000))
    assert set(first) == everything(Order((1, 2, 3), 0, "source", 3))
    assert all(400 < count < 600 for count in first.values())


def test_the_order_is_the_same_in_every_release() -> None:
    order = Order((3, 4), 7, "target", 2)
    assert [order.locate(offset) for offset in range(7)] == [(1, 2), (0, 2), (1, 1), (1, 3), (0, 1), (1, 0), (0, 0)]


def test_seeking_far_is_instant() -> None:
    order = Order((250,) * 100, 0, "source", 4)
    start = time.process_time()
    order.locate(10**9)
    order.locate(10**15)
    assert time.process_time() - start < 0.1


@given(divisions, divisions, st.integers(1, 3), st.integers(0, 10**9))
def test_a_step_takes_the_same_indices_on_any_machine(
    one: tuple[int, int], other: tuple[int, int], size: int, step: int
) -> None:
    batch = one[0] * one[1] * other[0] * other[1] * size

    def taken(world_size: int, accumulation: int) -> list[int]:
        return [
            index
            for number in range(accumulation)
            for rank in range(world_size)
            for index in micro_batch_indices(
                step, number, rank, world_size=world_size, accumulation=accumulation, global_batch=batch
            )
        ]

    assert taken(*one) == taken(*other) == list(range(step * batch, (step + 1) * batch))


@given(divisions, divisions, st.integers(1, 4), st.integers(0, 50))
def test_a_batch_of_another_size_goes_on_with_the_next_samples(
    one: tuple[int, int], other: tuple[int, int], size: int, step: int
) -> None:
    before, after = (size * world_size * accumulation for world_size, accumulation in (one, other))
    world_size, accumulation = other
    found = [
        index
        for number in range(accumulation)
        for rank in range(world_size)
        for index in micro_batch_indices(
            step,
            number,
            rank,
            world_size=world_size,
            accumulation=accumulation,
            global_batch=after,
            offset=step * before - step * after,
        )
    ]
    assert found == list(range(step * before, step * before + after))


@given(st.integers(1, 64), divisions)
def test_a_batch_that_cannot_be_divided_evenly_names_values_that_can(batch: int, division: tuple[int, int]) -> None:
    world_size, accumulation = division
    assume(batch % (world_size * accumulation))
    with pytest.raises(UserError) as caught:
        micro_batch_size(batch, world_size=world_size, accumulation=accumulation, key="training.source_batch")
    message = str(caught.value)
    assert message.startswith(f"training.source_batch: {batch} samples")
    suggested = -(-batch // (world_size * accumulation)) * world_size * accumulation
    assert f"{suggested} samples or a" in message
    if batch % accumulation == 0:
        assert f"[{', '.join(str(n) for n in range(1, batch + 1) if batch // accumulation % n == 0)}]" in message
    else:
        assert "another training.accumulation" in message
