"""Runs that need more of a machine than a GPU: a compiler, or asynchronous input and output of a disk."""

from pathlib import Path

import pytest

from tests.gpu.runs import losses, train

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def plain(streets: Path) -> list[float]:
    return losses(train(streets, "plain", "cuda"))


def test_a_compiled_backbone_has_the_losses_of_one_that_is_not(streets: Path, plain: list[float]) -> None:
    assert losses(train(streets, "compiled", "cuda", "model.compile=true")) == pytest.approx(plain, rel=0.02)


def test_an_optimiser_on_nvme_makes_the_steps_of_one_on_the_gpu(
    streets: Path, plain: list[float], tmp_path: Path
) -> None:
    keys = ("training.offload.optimizer=nvme", f"training.offload.nvme_path={tmp_path}")
    assert losses(train(streets, "nvme", "cuda", *keys, stage=3)) == pytest.approx(plain, rel=0.02)
