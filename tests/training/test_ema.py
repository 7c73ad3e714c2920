"""The moving average is that of a plain loop over whole parameters; the teacher is the network with it."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from dist_pca.config import RunConfig
from dist_pca.model.segmenter import build_network
from tests.training.teacher_ranks import teach
from tests.training.zero_runs import CLASSES, STEPS, assert_equal, batch, plain, run_config, through_deepspeed

pytestmark = pytest.mark.slow
DECAY = "training.ema_decay=0.6"
"""Reached in the second step, so that both the plain mean before and the decay after are seen."""


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        (stage, ranks) if stage == ranks == 2 else pytest.param(stage, ranks, marks=pytest.mark.exhaustive)
        for stage in (1, 2, 3)
        for ranks in (1, 2)
    ],
)
def test_partitions_are_averaged_as_a_plain_loop_averages_whole_parameters(
    tmp_path: Path, stage: int, ranks: int
) -> None:
    config = run_config(stage, "sgd", DECAY)
    assert_equal(through_deepspeed(tmp_path, config, ranks), plain(config, STEPS), config)


@pytest.mark.exhaustive
def test_an_average_goes_on_under_other_stages_and_world_sizes(tmp_path: Path) -> None:
    checkpoint, step = None, 0
    sizes = ["training.source_batch=6", "training.target_batch=6"]
    for stage, ranks in ((2, 2), (3, 1), (1, 3), (3, 2)):
        config = run_config(stage, "sgd", DECAY, *sizes)
        checkpoint = through_deepspeed(tmp_path, config, ranks, first=step, last=step + 1, load=checkpoint)
        step += 1
    assert checkpoint is not None
    assert_equal(checkpoint, plain(config, step), config)


def run(folder: Path, config: RunConfig, ranks: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(teach, (ranks, port, folder, config), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        (stage, ranks) if (stage, ranks) == (3, 2) else pytest.param(stage, ranks, marks=pytest.mark.exhaustive)
        for stage in (1, 2, 3)
        for ranks in (1, 2)
    ],
)
def test_the_teacher_is_the_averaged_network_and_leaves_the_student_as_it_was(
    tmp_path: Path, stage: int, ranks: int
) -> None:
    config = run_config(stage, "sgd", "training.ema_decay=0.6")
    found = run(tmp_path, config, ranks)
    expected = build_network(config.model, CLASSES).eval()
    expected.load_state_dict(found[0]["average"])
    with torch.no_grad():
        output = expected(batch(9, 4)[0])
    for rank in found:
        torch.testing.assert_close(rank["logits"], output.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["features"], output.features, rtol=1e-5, atol=1e-5)
        assert all(rank["unchanged"].values())
    # It differs from the student, or nothing would be shown.
    student = build_network(config.model, CLASSES).eval()
    student.load_state_dict(found[0]["trained"])
    with torch.no_grad():
        assert (student(batch(9, 4)[0]).logits - output.logits).abs().max() > 1e-3
    # Training goes on as if there had been no teacher.
    parameters, _ = plain(config, 3)
    for name, value in parameters.items():
        torch.testing.assert_close(found[0]["trained"][name], value, rtol=1e-4, atol=1e-5)
