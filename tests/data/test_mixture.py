from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dist_pca.data.source import Mixture, Order

weights = st.lists(st.sampled_from([0.1, 1 / 3, 0.5, 1.0, 2.0, 7.3]), min_size=1, max_size=4).map(tuple)


def mixture(weights: tuple[float, ...], seed: int = 3) -> Mixture:
    orders = tuple(Order((4, 3 + part), seed, "source", 2, part) for part in range(len(weights)))
    return Mixture(orders, weights, seed, "source")


@given(weights, st.integers(0, 2**40))
def test_every_folder_takes_its_turns_one_by_one(weights: tuple[float, ...], start: int) -> None:
    mixed = mixture(weights)
    turns: dict[int, list[int]] = {}
    for index in range(start, start + 600):
        part, turn = mixed.split(index)
        turns.setdefault(part, []).append(turn)
    for taken in turns.values():
        missing = set(range(min(taken), max(taken) + 1)) - set(taken)
        assert len(set(taken)) == len(taken)
        # Within the blocks that the range cuts off, turns are shuffled.
        assert all(turn - min(taken) < 256 or max(taken) - turn < 256 for turn in missing)


@given(weights, st.integers(1, 12))
def test_shares_hold_exactly_up_to_rounding_at_every_block(weights: tuple[float, ...], blocks: int) -> None:
    mixed = mixture(weights)
    taken = Counter(mixed.split(index)[0] for index in range(256 * blocks))
    for part, weight in enumerate(weights):
        assert abs(taken[part] - 256 * blocks * weight / sum(weights)) < 1.001


def test_one_folder_alone_is_ordered_as_without_a_mixture() -> None:
    mixed = mixture((0.3,))
    assert [mixed.locate(index)[1:] for index in range(20)] == [mixed.orders[0].locate(index) for index in range(20)]


def test_folders_are_spread_inside_a_block_and_differently_in_each() -> None:
    mixed = mixture((1.0, 1.0))
    blocks = [[mixed.split(256 * block + offset)[0] for offset in range(256)] for block in range(3)]
    assert blocks[0] != blocks[1] != blocks[2]
    assert all(40 < sum(parts[:128]) < 90 for parts in blocks)


def test_folders_are_shuffled_independently() -> None:
    one, other = (Order((50,), 0, "source", 1, part) for part in (0, 1))
    assert [one.locate(k) for k in range(50)] != [other.locate(k) for k in range(50)]
