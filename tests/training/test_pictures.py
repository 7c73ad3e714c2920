"""Pictures of training steps: drawn when they are due, from all ranks' images, without changing what is computed."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_pca.config import TelemetryConfig
from dist_pca.data.collate import Batch
from dist_pca.evaluation.training_pictures import training_pictures
from dist_pca.objective import Domain, Domains
from dist_pca.training.metrics import TIMING
from dist_pca.training.pictures import DrawnView, PictureLog
from dist_pca.training.views import View, Views
from tests.support.networks import CLASSES, run_config
from tests.support.ranks import run_on_ranks
from tests.support.runs import build_streets, launch
from tests.tools.matches.scenes import random_domain
from tests.training.alone import alone

SIZE = (4, 5)


def images(count: int, value: int = 100) -> torch.Tensor:
    return torch.full((count, 3, *SIZE), value, dtype=torch.uint8)


def mixed_domain(count: int) -> Domain:
    trusted = torch.zeros(count, *SIZE, dtype=torch.bool)
    trusted[:, 0] = True
    return random_domain(count, 2)._replace(trusted=trusted, confident=torch.ones_like(trusted))


class Drawn:
    """Stands in for a step of a run that draws every second step; records what is drawn and logged."""

    def __init__(self, *, fail: bool = False) -> None:
        self.calls, self.logged = list[Mapping[str, Any]](), list[int]()
        self.fail = fail
        config = run_config().model_copy(update={"telemetry": TelemetryConfig(pictures_every=2)})
        metrics: Any = SimpleNamespace(log_pictures=lambda pictures, step: self.logged.append(step))
        self.log = PictureLog(config, CLASSES, metrics, self.draw)

    def draw(self, config: object, classes: object, views: Mapping[str, DrawnView], **more: Any) -> dict[str, Any]:
        if self.fail:
            raise ValueError("no ink")
        self.calls.append({"views": views, **more})
        return {}

    def step(self, step: int, count: int = 2, value: int = 100) -> None:
        source, target = (random_domain(count, seed, teacher=True) for seed in (value, value + 1))
        source.features.requires_grad_()
        batches = [Batch(images(count, value), None, [""] * count, [0] * count, []) for _ in range(2)]
        views = Views(*(View(images(count) / 255, Domain) for _ in range(3)))
        terms = {"confident_share": torch.tensor(0.25)}
        self.log.log(step, (batches[0], batches[1]), views, Domains(source, target, mixed_domain(count)), terms)


def test_pictures_are_drawn_once_in_every_step_that_is_due() -> None:
    drawn = Drawn()
    with alone():
        for step in (1, 2, 2, 3, 4):
            drawn.step(step)
    assert drawn.logged == [2, 4]
    first = drawn.calls[0]
    assert list(first["views"]) == ["source", "target", "mixed"]
    assert (first["step"], first["ranks"], float(first["share"])) == (2, 1, 0.25)
    assert first["views"]["mixed"].images.dtype == torch.uint8
    assert first["views"]["mixed"].images.unique().tolist() == [100]
    assert not first["views"]["source"].domain.features.requires_grad


def test_a_picture_that_cannot_be_drawn_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    drawn = Drawn(fail=True)
    with alone(), caplog.at_level(logging.WARNING, logger="dist_pca.training"):
        drawn.step(2)
    assert [record.message for record in caplog.records] == ["no pictures of step 2: ValueError: no ink"]
    assert drawn.logged == []


def draw_on_a_rank(rank: int, ranks: int) -> list[int] | None:
    drawn = Drawn()
    drawn.step(2, count=2, value=10 * (rank + 1))
    if rank != 0:
        assert not drawn.calls
        return None
    (call,) = drawn.calls
    assert call["ranks"] == 2
    own = random_domain(2, 20, teacher=True)
    for name in ("features", "labels", "teacher_features", "teacher_logits"):
        assert torch.equal(getattr(call["views"]["source"].domain, name)[2:], getattr(own, name)), name
    return [int(value) for value in call["views"]["source"].images[:, 0, 0, 0]]


@pytest.mark.slow
def test_rank_0_draws_the_images_of_as_many_ranks_as_are_needed(tmp_path: Path) -> None:
    assert run_on_ranks(draw_on_a_rank, 3, tmp_path)[0] == [10, 10, 20, 20]


def test_a_view_of_each_kind_and_the_cycles_are_drawn_without_a_random_number() -> None:
    config = run_config()
    views = {
        "source": DrawnView(images(2), random_domain(2, 0, teacher=True)),
        "target": DrawnView(images(2), random_domain(2, 1, teacher=True)),
        "mixed": DrawnView(images(2), mixed_domain(2)),
    }
    before = torch.get_rng_state()
    start = config.objective.association.start_step
    drawn = training_pictures(config, CLASSES, views, step=start + 1, ranks=1, share=torch.tensor(0.5))
    assert torch.equal(torch.get_rng_state(), before)
    levels = [f"pictures/cycles_{level}" for level in config.objective.association.levels]
    assert list(drawn) == ["pictures/source", "pictures/target", "pictures/mixed", *levels]
    assert all(picture.dtype == "uint8" and picture.shape[2] == 3 for picture in drawn.values())
    # Input, pseudo labels, confidence, weight and prediction; the source has truth, teacher and prediction.
    assert drawn["pictures/mixed"].shape[1] > drawn["pictures/source"].shape[1]
    # The weight of a pasted row is 1, and that of all others the share.
    half = (drawn["pictures/mixed"] == 128).all(axis=2).mean()
    white = (drawn["pictures/mixed"][40:200] == 255).all(axis=2).mean()
    assert half > 0.1
    assert white > 0.1


def test_of_several_bands_the_first_three_are_drawn() -> None:
    many = torch.randint(0, 256, (2, 5, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def drawn(bands: torch.Tensor) -> dict[str, Any]:
        views = {name: DrawnView(bands, random_domain(2, 0, teacher=True)) for name in ("source", "target")}
        step = run_config().objective.association.start_step + 1
        return training_pictures(run_config(), CLASSES, views, step=step, ranks=1, share=None)

    whole, first = drawn(many), drawn(many[:, :3])
    assert whole.keys() == first.keys()
    assert all((whole[name] == first[name]).all() for name in whole)


def lines(run: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in found]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_with_pictures_computes_the_same_as_one_without_and_ends_with_a_report(tmp_path: Path) -> None:
    build_streets(tmp_path)
    keys = ("training.zero_stage=3", "training.ema_decay=0.9", "objective.self_training.start_step=0")
    validated = (f"data.validation={tmp_path}/dusk", "training.validate_every=3")
    options = ("--zero_stage", "3")
    done = launch(
        tmp_path,
        "drawn",
        *keys,
        *validated,
        "telemetry.pictures_every=2",
        "telemetry.report=true",
        launcher_options=options,
    )
    assert done.returncode == 0, done.stderr
    plain = launch(tmp_path, "plain", *keys, *validated, "telemetry.report=false", launcher_options=options)
    assert plain.returncode == 0, plain.stderr
    with_pictures, without = (tmp_path / "runs" / name for name in ("drawn", "plain"))
    assert lines(with_pictures) == lines(without)
    for part in ("model", "optimizer", "ema"):
        found, expected = (
            load_file(run / "checkpoints" / "step-00000006" / f"{part}.safetensors") for run in (with_pictures, without)
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected), part
    events = EventAccumulator(str(with_pictures / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    views = [f"pictures/{name}" for name in ("source", "target", "mixed", "cycles_features", "cycles_predictions")]
    assert events.Tags()["images"] == views
    assert [event.step for event in events.Images("pictures/target")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("validation_iou/road")] == [3, 6]
    assert f"saved after step 6 of 6; {with_pictures}/report.html shows the run" in done.stderr
    assert "IoU" in (with_pictures / "report.html").read_text()
    assert not (without / "report.html").exists()
