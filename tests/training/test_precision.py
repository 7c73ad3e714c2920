"""fp16 gradients are scaled where they would vanish, and the scale follows what overflows."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dist_pca.training.non_finite import FIRST_SCALE, GROWTH_STEPS, LARGEST_SCALE, LossScale
from tests.training.zero_runs import STEPS, plain, run_config, through_deepspeed


def engine() -> Any:
    told: list[float] = []
    return SimpleNamespace(
        optimizer=SimpleNamespace(override_loss_scale=told.append, torch_autocast_gradscaler="theirs")
    )


@given(st.lists(st.sampled_from([1.0, math.inf, math.nan]), max_size=60))
def test_the_scale_halves_at_every_overflow_down_to_one_and_is_to_blame_while_it_can(norms: list[float]) -> None:
    scale = LossScale(engine(), enabled=True, state={})
    expected = FIRST_SCALE
    for norm in norms:
        overflows = not math.isfinite(norm)
        assert scale.update(norm) == (overflows and expected > 1)
        expected = max(1.0, expected / 2) if overflows else expected
        assert scale.value == expected


def test_the_scale_doubles_after_many_finite_steps_up_to_a_limit() -> None:
    scale = LossScale(engine(), enabled=True, state={})
    for _ in range(GROWTH_STEPS - 1):
        scale.update(1.0)
    assert scale.value == FIRST_SCALE
    scale.update(1.0)
    assert scale.value == 2 * FIRST_SCALE
    for _ in range(30 * GROWTH_STEPS):
        scale.update(1.0)
    assert scale.value == LARGEST_SCALE


@given(st.lists(st.sampled_from([1.0, math.inf]), max_size=20), st.integers(0, 20))
def test_a_saved_scale_goes_on_as_if_it_had_not_been(norms: list[float], at: int) -> None:
    whole = LossScale(engine(), enabled=True, state={})
    broken = LossScale(engine(), enabled=True, state={})
    for index, norm in enumerate(norms):
        if index == at:
            broken = LossScale(engine(), enabled=True, state=broken.state)
        assert whole.update(norm) == broken.update(norm)
    assert broken.state == whole.state


def test_the_engine_is_told_and_its_own_scaler_is_off() -> None:
    watched = engine()
    told: list[float] = []
    watched.optimizer.override_loss_scale = told.append
    LossScale(watched, enabled=True, state={}).update(math.inf)
    assert told == [FIRST_SCALE, FIRST_SCALE / 2]
    assert watched.optimizer.torch_autocast_gradscaler is None


def test_other_precisions_are_not_scaled() -> None:
    untouched = engine()
    scale = LossScale(untouched, enabled=False, state={})
    assert not scale.update(math.inf)
    assert (scale.value, scale.state) == (1.0, {})
    assert untouched.optimizer.torch_autocast_gradscaler == "theirs"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_fp16_trains_nearly_as_fp32_does_and_is_clipped_alike(tmp_path: Path, stage: int) -> None:
    # Gradients are far below what fp16 can hold unscaled, and clipped.
    settings = ["optimizer.clip_norm=0.05", "optimizer.lr=1e-2"]
    config = run_config(stage, "sgd", "training.precision=fp16", *settings)
    checkpoint = through_deepspeed(tmp_path, config, 2)
    found = load_file(checkpoint / "model.safetensors")
    expected, start = plain(run_config(stage, "sgd", *settings), STEPS)[0], plain(config, 0)[0]
    apart = torch.cat([(found[name] - value).flatten() for name, value in expected.items()]).norm()
    moved = torch.cat([(start[name] - value).flatten() for name, value in expected.items()]).norm()
    assert moved > 1e-4
    assert apart < 0.05 * moved
