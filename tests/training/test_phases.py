"""Every second of a step belongs to one phase, also those of the association and of its waiting for other ranks."""

import time

import pytest
import torch

from dist_pca.association.phases import phase
from dist_pca.training.phases import PhaseClock


class Watched:
    """What a watchdog was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int | None]] = []

    def enter(self, phase: str, step: int | None = None) -> None:
        self.told.append((phase, step))


def test_phases_add_up_to_the_time_that_passed_and_the_watchdog_knows_each() -> None:
    watchdog = Watched()
    began = time.perf_counter()
    with PhaseClock(watchdog, torch.device("cpu")) as clock:  # type: ignore[arg-type]
        clock.enter("data", 7)
        time.sleep(0.02)
        clock.enter("forward")
        with phase("association"):
            time.sleep(0.01)
            with phase("exchange"):
                time.sleep(0.03)
        time.sleep(0.02)
        clock.enter("backward")
        seconds = clock.take()
    passed = time.perf_counter() - began
    assert sum(seconds.values()) == pytest.approx(passed, abs=0.005)
    for name, least in {"data": 0.02, "association": 0.01, "communication": 0.03, "forward": 0.02}.items():
        assert least <= seconds[name] < least + 0.015, name
    assert [name for name, _ in watchdog.told] == [
        *("data", "forward", "association", "communication", "association", "forward", "backward")
    ]
    assert watchdog.told[0] == ("data", 7)
    assert sum(clock.take().values()) < 0.02


def test_without_a_clock_phases_cost_and_tell_nothing() -> None:
    with PhaseClock(Watched(), torch.device("cpu")) as clock:  # type: ignore[arg-type]
        clock.enter("forward")
    clock.take()
    with phase("association"):
        time.sleep(0.01)
    assert "association" not in clock.take()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="phases are timed by events on GPUs, and there is none")
def test_on_a_gpu_a_phase_is_the_time_its_work_takes_there_and_not_its_launch() -> None:
    device = torch.device("cuda")
    x = torch.rand(8192, 8192, device=device)
    x @ x
    torch.cuda.synchronize()
    with PhaseClock(Watched(), device) as clock:  # type: ignore[arg-type]
        clock.enter("forward")
        for _ in range(20):
            x @ x
        launched = time.perf_counter()
        clock.enter("log")
        seconds = clock.take()
    assert seconds["forward"] > 0.5 * (time.perf_counter() - launched)
    assert seconds["log"] < 0.1 * seconds["forward"]
