"""What an Accelerate config file says is followed, or refused by name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from dist_pca.errors import UserError
from dist_pca.resilience.launch import launch_command
from dist_pca.resilience.launcher_settings import SETTINGS, check_launcher, check_launcher_file
from dist_pca.resources import names, resource

BASE: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": 2}


def written(folder: Path, **settings: Any) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(BASE | settings))
    return file


@pytest.mark.parametrize("name", [name for name in names("launch") if name.startswith("accelerate/")])
def test_every_shipped_file_is_followed(name: str) -> None:
    check_launcher_file(resource("launch", name))


def test_what_accelerates_own_questionnaire_writes_is_followed(tmp_path: Path) -> None:
    off = {"downcast_bf16": "no", "debug": False, "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False}
    deepspeed = {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "offload_optimizer_device": "none"}
    deepspeed |= {"offload_param_device": "none", "zero3_init_flag": False, "zero_stage": 2}
    usual = {"enable_cpu_affinity": False, "machine_rank": 0, "main_training_function": "main", "num_machines": 1}
    others = {"mixed_precision": "bf16", "rdzv_backend": "static", "same_network": True, "use_cpu": False}
    check_launcher_file(written(tmp_path, deepspeed_config=deepspeed, fsdp_config={}, **off, **usual, **others))


def test_the_table_has_a_row_for_every_setting_that_accelerate_knows() -> None:
    known = {setting.name.partition(".")[0] for setting in SETTINGS}
    assert set(ClusterConfig.__dataclass_fields__) <= known


@pytest.mark.parametrize(
    ("settings", "name", "remedy"),
    [
        (
            {"deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            "deepspeed_config.deepspeed_config_file",
            "training.zero_stage",
        ),
        ({"deepspeed_config": {"zero3_init_flag": True}}, "deepspeed_config.zero3_init_flag", "false"),
        ({"deepspeed_config": {"zero3_save_16bit_model": True}}, "deepspeed_config.zero3_save_16bit_model", "false"),
        ({"deepspeed_config": {"offload_optimizer_nvme_path": "/disk"}}, "offload_optimizer_nvme_path", "nvme_path"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "distributed_type", "DEEPSPEED"),
        ({"fsdp_config": {"fsdp_offload_params": True}}, "fsdp_config.fsdp_offload_params", "training.zero_stage"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_config.dynamo_backend", "model.compile"),
        ({"mixed_precision": "fp8"}, "mixed_precision", "bf16"),
        ({"fp8_config": {"backend": "TE"}}, "fp8_config.backend", "bf16"),
        ({"megatron_lm_config": {"megatron_lm_tp_degree": 2}}, "megatron_lm_config", "ZeRO"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "parallelism_config", "ZeRO"),
        ({"distributed_type": "XLA"}, "distributed_type", "DEEPSPEED"),
        ({"tpu_name": "v4"}, "tpu_name", "GPUs"),
        ({"downcast_bf16": True}, "downcast_bf16", "GPUs"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment", "LOCAL_MACHINE"),
        ({"debug": True}, "debug", "false"),
    ],
)
def test_a_setting_without_effect_is_refused_by_name_with_what_to_do(
    tmp_path: Path, settings: dict[str, Any], name: str, remedy: str
) -> None:
    file = written(tmp_path, **settings)
    with pytest.raises(
        UserError, match=rf"^launcher .*mine\.yaml: .*{name}.*: .* without effect in this run; .*{remedy}"
    ):
        launch_command("camvid", launcher=str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_proceses": 3}, "num_proceses: unknown key; the nearest is num_processes$"),
        (
            {"deepspeed_config": {"zero_stages": 3}},
            "deepspeed_config.zero_stages: unknown key; the nearest is deepspeed_config.zero_stage$",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_launcher_file(written(tmp_path, **settings))


@pytest.mark.parametrize("text", ["- a\n", "a: [", "{", "\x00"])
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^launcher .*mine\.yaml: [^\n]*$"):
        check_launcher_file(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", r"deepspeed_config\.deepspeed_config_file: ds\.json"),
        ("ACCELERATE_USE_FSDP", "true", "fsdp_config: true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_config: INDUCTOR"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision: fp8"),
    ],
)
def test_what_a_launcher_passes_on_is_refused_by_name_too(variable: str, value: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"^launcher \({variable}\): {name} would be without effect"):
        check_launcher({variable: value})
    check_launcher({variable: "no"})


@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_ranks_that_see_gpus_refuse_to_be_kept_off_them_by_a_variable_alone(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        UserError,
        match=rf"^launcher \(ACCELERATE_USE_CPU\): use_cpu: {value} would be without effect in this run; put "
        "CUDA_VISIBLE_DEVICES= before the command instead$",
    ):
        check_launcher({"ACCELERATE_USE_CPU": value})
    check_launcher({"ACCELERATE_USE_CPU": "False"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_launcher({"ACCELERATE_USE_CPU": value})


@pytest.mark.slow
def test_ranks_read_the_file_of_the_launcher_that_passes_less_on_than_it_says(tmp_path: Path) -> None:
    file = written(
        tmp_path, num_processes=1, use_cpu=True, main_process_port=0, dynamo_config={"dynamo_backend": "EAGER"}
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file.name]
    done = subprocess.run(
        [*command, "-m", "dist_pca.train", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert f"error: launcher {file}: dynamo_config.dynamo_backend: EAGER would be without effect" in done.stderr
