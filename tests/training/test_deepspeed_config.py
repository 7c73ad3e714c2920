import pytest

from dist_pca.config import RunConfig, load_config
from dist_pca.config.training import OffloadConfig
from dist_pca.errors import UserError
from dist_pca.resources import resource
from dist_pca.training.deepspeed_config import LAUNCHER_FIELDS, deepspeed_config, reconcile_launcher


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in LAUNCHER_FIELDS:
        monkeypatch.delenv(variable, raising=False)


def demo(*overrides: str) -> RunConfig:
    return load_config(resource("configs", "demo"), overrides)


def test_the_launchers_stage_is_taken_where_the_config_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert reconcile_launcher(demo()).training.zero_stage == 3


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", r"training\.zero_stage: Input should be 1, 2 or 3, got 0"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", r"training\.offload\.parameters: Input should be .*, got 0"),
    ],
)
def test_a_launchers_value_that_is_none_of_ours_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, message: str
) -> None:
    monkeypatch.setenv(variable, "0")
    with pytest.raises(UserError, match=f"config and launcher: {message}"):
        reconcile_launcher(demo())


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "training.zero_stage is 2 in the config and 3 in the launcher"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.accumulation is 1 in the config and 4"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", r"optimizer.clip_norm is 0.0 in the config and 0.5"),
        (
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "nvme",
            "training.offload.optimizer is cpu in the config and nvme in the launcher",
        ),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "training.precision is fp32 in the config and bf16"),
    ],
)
def test_values_that_disagree_are_both_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        reconcile_launcher(demo("training.zero_stage=2", "training.offload.optimizer=cpu"))


def test_the_launchers_own_defaults_disagree_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    run = demo("training.accumulation=4", "training.precision=bf16", "training.offload.optimizer=cpu")
    assert reconcile_launcher(run).training == run.training.model_copy(
        update={"zero_stage": 2, "offload": OffloadConfig(optimizer="cpu", parameters="none")}
    )


def test_clipping_at_one_contradicts_a_run_only_where_it_is_written_in_the_launchers_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    assert reconcile_launcher(demo()).optimizer.clip_norm == 0
    file = {"deepspeed_config.gradient_clipping"}
    monkeypatch.setattr("dist_pca.training.deepspeed_config.check_launcher", lambda environment: file)
    with pytest.raises(UserError, match=r"optimizer\.clip_norm is 0\.0 in the config and 1\.0 in the launcher"):
        reconcile_launcher(demo())
    assert reconcile_launcher(demo("optimizer.clip_norm=1")).optimizer.clip_norm == 1


def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="fp16 does not run on CPU; use bf16 or fp32"):
        reconcile_launcher(demo("training.precision=fp16"))


def test_deepspeeds_configuration_is_the_runs() -> None:
    values = deepspeed_config(
        demo("training.accumulation=2", "optimizer.clip_norm=0.5", "training.precision=bf16", "training.zero_stage=3")
    )
    assert values["gradient_accumulation_steps"] == 2
    assert values["gradient_clipping"] == 0.5
    assert values["zero_optimization"]["stage"] == 3
    assert values["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    # DeepSpeed clips at 1 unless it is told not to.
    assert deepspeed_config(reconcile_launcher(demo()))["gradient_clipping"] == 0
