"""What an Accelerate config file may say: each setting is honoured, or refused by name."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import yaml

from dist_pca.errors import UserError, nearest

_OFF = frozenset({"", "no", "none", "null", "false", "0", "[]", "{}", "disable"})
"""Values of a setting that ask for nothing."""


class Setting(NamedTuple):
    """A setting of Accelerate's, in its config file or as the variable in which its launcher passes it to ranks."""

    name: str
    """Key in the file; those of a section after a dot, with `*` for all of them."""
    variable: str | None = None
    allowed: frozenset[str] | None = None
    """Values that a run can follow, in lower case; None is any."""
    remedy: str = ""
    """What to do about any other value."""


_ON_NODES = frozenset({"deepspeed", "no", "multi_gpu", "multi_cpu"})
_CONFIG = "remove it and set training.zero_stage, training.offload, training.precision and optimizer.clip_norm"
_ZERO = "remove it and use ZeRO: distributed_type: DEEPSPEED with training.zero_stage"
_INIT = "set it to false, since every rank builds the network before it is partitioned"
_SAVE = "set it to false, since checkpoints hold fp32 weights"
_NVME = "remove it and set training.offload.nvme_path"
_DEBUG = "set it to false, since dist-pca checks its collectives itself"
_NODES = "remove it, since runs train on GPUs or CPUs of nodes that are there"
_MOE = "remove it, since no backbone has such layers"
_ON_GPUS = Setting("use_cpu", "ACCELERATE_USE_CPU", _OFF, "put CUDA_VISIBLE_DEVICES= before the command instead")
"""Refused by ranks that see GPUs: Accelerate takes these where it sets up DeepSpeed."""
SETTINGS = (
    # Followed by the launcher itself.
    *(Setting(name) for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip")),
    *(Setting(name) for name in ("main_process_port", "rdzv_backend", "same_network", "gpu_ids", "use_cpu")),
    *(Setting(name) for name in ("enable_cpu_affinity", "main_training_function")),
    *(Setting(f"deepspeed_config.deepspeed_{name}") for name in ("multinode_launcher", "hostfile")),
    *(Setting(f"deepspeed_config.deepspeed_{name}_filter") for name in ("exclusion", "inclusion")),
    # Merged with the config of the run.
    *(Setting(f"deepspeed_config.{name}") for name in ("zero_stage", "gradient_accumulation_steps")),
    *(Setting(f"deepspeed_config.{name}") for name in ("gradient_clipping", "offload_optimizer_device")),
    Setting("deepspeed_config.offload_param_device"),
    Setting("mixed_precision", "ACCELERATE_MIXED_PRECISION", _OFF | {"fp16", "bf16"}, "use training.precision=bf16"),
    # Not followed.
    Setting("compute_environment", None, frozenset({"local_machine"}), "use LOCAL_MACHINE, under SLURM too"),
    Setting("distributed_type", None, _ON_NODES, "use DEEPSPEED with training.zero_stage"),
    Setting("deepspeed_config.deepspeed_config_file", "ACCELERATE_DEEPSPEED_CONFIG_FILE", _OFF, _CONFIG),
    Setting("deepspeed_config.deepspeed_moe_layer_cls_names", "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", _OFF, _MOE),
    Setting("deepspeed_config.zero3_init_flag", "ACCELERATE_DEEPSPEED_ZERO3_INIT", _OFF, _INIT),
    Setting("deepspeed_config.zero3_save_16bit_model", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", _OFF, _SAVE),
    *(Setting(f"deepspeed_config.offload_{part}_nvme_path", None, _OFF, _NVME) for part in ("optimizer", "param")),
    Setting("fsdp_config.*", "ACCELERATE_USE_FSDP", _OFF, _ZERO),
    Setting("megatron_lm_config.*", "ACCELERATE_USE_MEGATRON_LM", _OFF, _ZERO),
    Setting("parallelism_config.*", "ACCELERATE_USE_PARALLELISM_CONFIG", _OFF, _ZERO),
    Setting("dynamo_config.*", "ACCELERATE_DYNAMO_BACKEND", _OFF, "remove it and set model.compile=true"),
    Setting("fp8_config.*", None, _OFF, "remove it and use training.precision=bf16"),
    Setting("mpirun_config.*", None, _OFF, "remove it, since Accelerate or SLURM starts the ranks"),
    Setting("debug", "ACCELERATE_DEBUG_MODE", _OFF, _DEBUG),
    *(Setting(name, None, _OFF, _NODES) for name in ("downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster")),
    *(Setting(name, None, _OFF, _NODES) for name in ("tpu_use_sudo", "tpu_vm", "tpu_env", "command_file", "commands")),
)
"""The one table of them."""


def check_launcher_file(file: Path) -> set[str]:
    """Check that a run follows all that an Accelerate config file says, and return the names of its settings.

    Raises:
        UserError: it cannot be read, or has a setting that would be without effect.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"launcher {file}: cannot be read ({' '.join(str(error).split())})") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"launcher {file}: not a table of keys and values; start from one in launch/accelerate/")
    known = {setting.name: setting for setting in SETTINGS}
    settings = dict(_flat(content))
    for name, value in settings.items():
        setting = known.get(name) or known.get(f"{name.partition('.')[0]}.*")
        if setting is None:
            raise UserError(f"launcher {file}: {name}: unknown key; the nearest is {nearest(name, known)}")
        _check(setting, name, value, f"launcher {file}")
    return set(settings)


def check_launcher(environment: Mapping[str, str]) -> set[str]:
    """Check in a rank that the run follows all that its launcher passed on or read from a file.

    Args:
        environment: Environment variables of the rank.

    Returns:
        Names of the settings in the file; empty without one.

    Raises:
        UserError: it has a setting that would be without effect.
    """
    for setting in (*SETTINGS, *((_ON_GPUS,) if torch.cuda.is_available() else ())):
        value = environment.get(setting.variable or "")
        if value is not None:
            _check(setting, setting.name.removesuffix(".*"), value, f"launcher ({setting.variable})")
    file = _file_of_launcher() if "RANK" in environment else None
    return set() if file is None else check_launcher_file(file)


def _check(setting: Setting, name: str, value: object, origin: str) -> None:
    written = str(value).strip()
    if setting.allowed is not None and written.lower() not in setting.allowed:
        raise UserError(f"{origin}: {name}: {written} would be without effect in this run; {setting.remedy}")


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield settings of the file and of its sections, the latter with a dot."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        elif value is not None or not str(name).endswith("_config"):
            yield str(name), value


def _file_of_launcher() -> Path | None:
    """Find the config file with which the parent process, if it is Accelerate's launcher, was started.

    Under DeepSpeed, Accelerate does not pass all that the file says on to ranks.
    """
    with suppress(psutil.Error, OSError):
        words = psutil.Process(os.getppid()).cmdline()
        folder = Path(psutil.Process(os.getppid()).cwd())
        if any("accelerate" in word for word in words):
            for word, following in zip(words, [*words[1:], ""], strict=True):
                found = re.fullmatch(r"--config[_-]file(?:=(.*))?", word)
                if found is not None:
                    file = folder / (found[1] or following)
                    return file if file.is_file() else None
    return None
