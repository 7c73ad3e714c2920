"""Each second of a step belongs to one phase; traces open; operations are counted once and exactly."""

import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_pca.association.candidates import phase
from dist_pca.config import TelemetryConfig, load_config
from dist_pca.config.telemetry import profile_overrides
from dist_pca.errors import UserError
from dist_pca.model.segmenter import Output, build_segmenter
from dist_pca.resources import resource
from dist_pca.training.profiling import PhaseClock, Profile, network_flops, network_passes, peak_flops, peak_memory
from tests.training.alone import alone


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
            with phase("communication"):
                time.sleep(0.03)
        time.sleep(0.02)
        clock.enter("backward")
        seconds = clock.take()
    passed = time.perf_counter() - began
    assert sum(seconds.values()) <= passed
    for name, least in {"data": 0.02, "association": 0.01, "communication": 0.03, "forward": 0.02}.items():
        assert least <= seconds[name] <= passed - (0.08 - least), name
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


@pytest.mark.gpu
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


def traced(folder: Path, config: TelemetryConfig, steps: range) -> None:
    with alone(), PhaseClock(Watched(), torch.device("cpu")) as clock:  # type: ignore[arg-type]
        profile = Profile(config, folder, clock)
        profile.before(steps.start)
        for step in steps:
            clock.enter("forward", step)
            torch.ones(step, 2) @ torch.ones(2, 3)
            clock.enter("backward")
            profile.before(step + 1)
        profile.close()


def events(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return found


def test_a_trace_holds_the_steps_and_their_phases_and_the_log_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dist_pca.training"):
        traced(tmp_path, TelemetryConfig(profile_start=3, profile_steps=2), range(1, 9))
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-3-4.rank0.json.gz"
    assert any(str(file) in record.message for record in caplog.records)
    found = events(file)
    assert len([event for event in found if event["name"] == "forward"]) == 2
    products = [event["args"]["Input Dims"][0] for event in found if event["name"] == "aten::mm"]
    assert products == [[3, 2], [4, 2]]


def test_a_run_that_ends_within_the_trace_writes_what_there_is(tmp_path: Path) -> None:
    traced(tmp_path, TelemetryConfig(profile_start=4, profile_steps=9), range(3, 6))
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-4-5.rank0.json.gz"


@pytest.mark.parametrize("start", [None, 2])
def test_without_a_wish_and_after_its_steps_nothing_is_traced(tmp_path: Path, start: int | None) -> None:
    traced(tmp_path, TelemetryConfig(profile_start=start), range(3, 6))
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    with pytest.raises(UserError, match=r"rank0\.json\.gz: cannot be written"):
        traced(tmp_path, TelemetryConfig(profile_start=1, profile_steps=1), range(1, 3))


def test_the_command_lines_profile_names_steps() -> None:
    assert profile_overrides("100:5") == ["telemetry.profile_start=100", "telemetry.profile_steps=5"]
    with pytest.raises(UserError, match="--profile 100: write START:STEPS"):
        profile_overrides("100")


class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def forward(self, images: torch.Tensor) -> Output:
        logits = self.convolution(images)
        return Output(logits, logits)


def test_a_convolution_counts_two_operations_a_product_forward_and_as_many_backward() -> None:
    forward = 2 * (3 * 3 * 3) * 8 * 10 * 12
    # Images need no gradient, so the way back is that of the weight alone.
    assert network_flops(OneConvolution(), 3, 10, 12) == 2 * forward


@pytest.mark.parametrize("batch_norm", ["local", "sync", "frozen"])
def test_counting_leaves_the_network_as_it_was(batch_norm: str) -> None:
    settings = ["model.backbone=test_resnet", "model.weights=scratch", "model.output_stride=null"]
    config = load_config(resource("configs", "demo"), [*settings, f"model.batch_norm={batch_norm}"])
    model = build_segmenter(config.model, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    small, large = network_flops(model, 3, 64, 64), network_flops(model, 3, 128, 128)
    assert 0 < 3.5 * small < large < 4.5 * small
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_what_checkpointing_computes_anew_does_not_count(backbone: str) -> None:
    counts = []
    for checkpointing in (False, True):
        settings = ["model.weights=scratch", "model.output_stride=null", f"model.backbone={backbone}"]
        config = load_config(
            resource("configs", "demo"), [*settings, f"model.activation_checkpointing={checkpointing}"]
        )
        model = build_segmenter(config.model, 5)
        counts.append(network_flops(model, 3, 64, 64))
        on = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
        assert bool(on) is checkpointing
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("name", "half", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA A10", 125, 62.5),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA GB200", 2500, 1250),
        ("NVIDIA GH200 480GB", 989.4, 494.7),
        ("Tesla V100-SXM2-32GB", 125, 15.7),
        ("Tesla V100S-PCIE-32GB", 130, 16.4),
        ("AMD Instinct MI300X", 1307.4, 653.7),
    ],
)
def test_a_devices_peak_is_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, half: float, fp32: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == half * 1e12
    assert peak_flops(torch.device("cuda"), "fp32") == fp32 * 1e12


@pytest.mark.parametrize(
    "name", ["Some Accelerator 9", "NVIDIA RTX A4000", "NVIDIA RTX A3000 Laptop GPU", "NVIDIA T400", "NVIDIA T4G"]
)
def test_a_peak_that_is_not_known_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "fp32") is None


def test_peak_memory_covers_what_was_held() -> None:
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) > held.nbytes


TEACHER = ("training.ema_decay=0.9", "objective.self_training.weight=1")


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (("objective.adapt=false",), 6),
        (("objective.smoothness.weight=0.01",), 6 + 6),
        # The source, the target as it is and mixed, and the teacher's forward pass.
        ((*TEACHER, "objective.association.weight=0.1"), 6 + 2 * 6 + 6 / 3),
        (
            (*TEACHER, "objective.association.weight=0", "objective.smoothness.weight=0"),
            6 + 6 + 6 / 3,
        ),
        (
            (*TEACHER, "objective.association.weight=0.1", "objective.masked_consistency.weight=1"),
            6 + 3 * 6 + 6 / 3,
        ),
    ],
)
def test_every_view_and_a_third_of_what_the_teacher_sees_pass_the_network(
    overrides: tuple[str, ...], passes: float
) -> None:
    config = load_config(
        resource("configs", "gta5_to_cityscapes_paper"),
        [
            *("training.source_batch=6", "training.target_batch=6", "objective.masked_consistency.weight=0"),
            "model.running_statistics=all",
            *("objective.association.teacher_matches=false", "objective.self_training.weight=0"),
            *overrides,
        ],
    )
    assert network_passes(config) == pytest.approx(passes)
