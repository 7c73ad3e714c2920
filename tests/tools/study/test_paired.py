import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.tools.study.paired import paired_difference, t_quantile

values = st.floats(0, 1)
by_seed = st.dictionaries(st.integers(0, 9), st.tuples(values, values), min_size=2, max_size=8)


def mass_within(t: float, degrees: int) -> float:
    """Integral of Student's density from -t to t, by the trapezoidal rule."""
    x = torch.linspace(0, t, 200_001, dtype=torch.float64)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    density = torch.exp(log_scale - (degrees + 1) / 2 * torch.log1p(x**2 / degrees))
    return 2 * float(torch.trapezoid(density, x))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 13, 30, 101])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_the_quantile_bounds_its_mass_of_students_density(degrees: int, confidence: float) -> None:
    assert mass_within(t_quantile(degrees, confidence), degrees) == pytest.approx(confidence, abs=1e-6)


@pytest.mark.parametrize(("degrees", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262)])
def test_the_quantile_is_that_of_printed_tables(degrees: int, printed: float) -> None:
    assert t_quantile(degrees) == pytest.approx(printed, abs=5e-4)


def test_the_quantile_goes_to_the_normal_distributions() -> None:
    assert t_quantile(100_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-4)


def test_three_pairs_worked_out_by_hand() -> None:
    found = paired_difference({0: 0.31, 1: 0.33, 2: 0.35}, {0: 0.30, 1: 0.30, 2: 0.30})
    assert found is not None
    # Differences .01, .03, .05: mean .03, s = .02, standard error .02 / sqrt(3), t = 4.3027.
    assert found.pairs == 3
    assert found.mean == pytest.approx(0.03)
    assert found.standard_error == pytest.approx(0.011547, abs=1e-6)
    assert found.low == pytest.approx(0.03 - 4.302653 * 0.011547, abs=1e-6)
    assert found.high == pytest.approx(0.03 + 4.302653 * 0.011547, abs=1e-6)


@given(by_seed)
def test_swapping_the_two_turns_the_difference_round(pairs: dict[int, tuple[float, float]]) -> None:
    ours, theirs = ({seed: pair[place] for seed, pair in pairs.items()} for place in (0, 1))
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there is not None
    assert back is not None
    assert there.mean == pytest.approx(-back.mean)
    assert there.standard_error == pytest.approx(back.standard_error)
    assert there.low is not None
    assert there.low == pytest.approx(-back.high)  # type: ignore[operator]


@given(by_seed, st.floats(-1, 1))
def test_what_a_seed_adds_to_both_cancels(pairs: dict[int, tuple[float, float]], shift: float) -> None:
    ours, theirs = ({seed: pair[place] for seed, pair in pairs.items()} for place in (0, 1))
    plain = paired_difference(ours, theirs)
    shifted = paired_difference(*({seed: v + seed * shift for seed, v in part.items()} for part in (ours, theirs)))
    assert plain is not None
    assert shifted is not None
    assert shifted.mean == pytest.approx(plain.mean, abs=1e-9)
    assert shifted.standard_error == pytest.approx(plain.standard_error, abs=1e-9)


def test_only_seeds_that_both_have_are_compared() -> None:
    found = paired_difference({0: 0.5, 1: 0.9, 2: math.nan}, {0: 0.4, 2: 0.1, 3: 0.1})
    assert found is not None
    assert tuple(found) == (1, pytest.approx(0.1), None, None, None)
    assert paired_difference({0: 0.5}, {1: 0.5}) is None


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = (0.02 + 0.01 * torch.randn(2000, 3, generator=generator)).tolist()
    covered = 0
    for row in drawn:
        found = paired_difference(dict(enumerate(row)), dict.fromkeys(range(3), 0.0))
        assert found is not None
        covered += found.low <= 0.02 <= found.high  # type: ignore[operator]
    assert covered / len(drawn) == pytest.approx(0.95, abs=0.015)
