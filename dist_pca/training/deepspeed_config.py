"""What the config and the launcher set between them, and DeepSpeed's configuration, which is derived from it."""

import os
import shutil
from typing import Any

import torch

from dist_pca.config import RunConfig, validate_config
from dist_pca.errors import UserError
from dist_pca.resilience.launcher_settings import check_launcher

LAUNCHER_FIELDS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "training.zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "training.offload.optimizer",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "training.offload.parameters",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "training.accumulation",
    "ACCELERATE_GRADIENT_CLIPPING": "optimizer.clip_norm",
    "ACCELERATE_MIXED_PRECISION": "training.precision",
}
CLIPPING = "deepspeed_config.gradient_clipping"
"""Setting of a launcher file that is written there only if it is wanted, whereas the launcher always passes one on."""
DEFAULTS = {"training.zero_stage": 2, "training.offload.optimizer": "none", "training.offload.parameters": "none"}
"""Values of keys that a config may leave to the launcher, where the launcher does not set them either."""
BUCKET_ELEMENTS = 50_000_000
"""Elements of the buckets in which gradients are reduced and weights gathered."""
PERSISTENT_ELEMENTS = 100_000
"""ZeRO 3 keeps parameters with fewer elements whole on every rank."""


def reconcile_launcher(config: RunConfig) -> RunConfig:
    """Merge the launcher's settings into a run: ZeRO stage and offload, where its config leaves them open.

    Raises:
        UserError: config and launcher contradict each other, the launcher has a setting that no run follows, or
            precision, offload or compilation cannot run here.
    """
    written = check_launcher(os.environ)
    values = config.model_dump()
    for variable, key in LAUNCHER_FIELDS.items():
        theirs = os.environ.get(variable, "none")
        section, name = _find(values, key)
        if theirs in ("auto", "none", "no"):
            continue
        if section[name] is None:
            section[name] = int(theirs) if theirs.isdigit() else theirs
            continue
        # The launcher always exports its defaults, which are no contradiction.
        by_default = theirs in ("1", "1.0") and key != "training.zero_stage"
        is_default = by_default and not (key == "optimizer.clip_norm" and CLIPPING in written)
        if not is_default and not _equal(theirs, section[name]):
            raise UserError(
                f"{key} is {section[name]} in the config and {theirs} in the launcher ({variable}); "
                "make them equal or remove one of the two"
            )
    for key, default in DEFAULTS.items():
        section, name = _find(values, key)
        section[name] = default if section[name] is None else section[name]
    run = validate_config(values, "config and launcher")
    training, stage = run.training, run.training.zero_stage
    _check_offload(run)
    if run.model.compile and stage == 3:
        raise UserError(
            "model.compile does not work with ZeRO stage 3, which gathers parameters between layers; use stage 1 or 2"
        )
    if run.model.compile and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "model.compile: needs a C++ compiler on a CPU, and there is no g++; install one, or set it to false"
        )
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.precision: fp16 does not run on CPU; use bf16 or fp32")
    return run


def _find(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    return values, name


def _equal(theirs: str, ours: object) -> bool:
    return theirs == ours if isinstance(ours, str) else float(theirs) == ours


def _check_offload(run: RunConfig) -> None:
    training = run.training
    offload, stage = training.offload, training.zero_stage
    wants = {
        "parameters": offload.moves_parameters and stage != 3,
        "optimizer: nvme": offload.optimizer == "nvme" and stage != 3,
    }
    for what, refused in wants.items():
        if refused:
            raise UserError(
                f"training.offload.{what} needs ZeRO stage 3, but the run uses {stage}; set training.zero_stage=3"
            )
    if offload.optimizer == "nvme" and training.ema_decay > 0:
        raise UserError(
            "training.ema_decay: the moving average stays in memory, which offloading to nvme is to free; set it to 0, "
            "or offload to cpu"
        )
    if offload.parameters == "nvme" and not torch.cuda.is_available():
        # Where the accelerator has no fp16, DeepSpeed writes them as bf16 and trains on what it reads back.
        raise UserError("training.offload.parameters: nvme rounds weights to bf16 on a CPU; use none or cpu")
    if offload.parameters == "nvme" and run.objective.uses_teacher:
        raise UserError(
            "training.offload.parameters: a teacher's weights are swapped with parameters in memory, and nvme leaves "
            "none there; use none or cpu, or train without a teacher"
        )
    if "nvme" in (offload.optimizer, offload.parameters):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                "training.offload: nvme needs libaio with its headers (Debian: libaio-dev) and a C++ compiler; install "
                "them, or offload to cpu"
            )


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for a run that `reconcile_launcher` returned."""
    stage = config.training.zero_stage
    values: dict[str, Any] = {
        # Only reported by DeepSpeed; batches are made by our own streams, possibly more than one image at a time.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.training.accumulation,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_allow_untested_optimizer": True,
        # Its own optimiser for the CPU has to be compiled; torch's does without.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
        },
    }
    if stage == 3:
        values["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    offload = config.training.offload
    for part, device in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if device != "none":
            pinned = torch.cuda.is_available()
            values["zero_optimization"][part] = {"device": device, "nvme_path": offload.nvme_path, "pin_memory": pinned}
    if config.training.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.training.precision]
        values["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return values
