import pytest

from dist_pca.config import load_config
from dist_pca.resources import resource
from dist_pca.training.schedule import learning_rate_factor


def factor(step: int, *overrides: str) -> float:
    return learning_rate_factor(load_config(resource("configs", "gta5_to_cityscapes_paper"), overrides), step)


def test_poly_falls_to_zero_at_its_horizon_not_at_the_last_step() -> None:
    assert factor(0) == 1
    assert factor(5580) == pytest.approx(0.5**0.9)
    assert factor(10415) > 0
    assert factor(10415, "schedule.horizon=10416") == pytest.approx((1 / 10416) ** 0.9)


def test_warm_up_rises_linearly_and_ends_on_the_poly_curve() -> None:
    assert factor(0, "schedule.warmup_steps=10") == pytest.approx(0.1)
    assert factor(4, "schedule.warmup_steps=10", "schedule.name=constant") == pytest.approx(0.5)
    assert factor(10, "schedule.warmup_steps=10") == factor(10)
