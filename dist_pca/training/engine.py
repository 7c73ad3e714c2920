"""The process group, the device and the DeepSpeed engine: everything that depends on how the run was started."""

import os
import shutil
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from dist_pca.config import RunConfig, validate_config
from dist_pca.cores import usable_cores
from dist_pca.errors import UserError

LAUNCHER_FIELDS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "training.zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "training.offload.optimizer",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "training.offload.parameters",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "training.accumulation",
    "ACCELERATE_GRADIENT_CLIPPING": "optimizer.clip_norm",
    "ACCELERATE_MIXED_PRECISION": "training.precision",
}
DEFAULTS = {"training.zero_stage": 2, "training.offload.optimizer": "none", "training.offload.parameters": "none"}
"""Keys that a config may leave to the launcher, and their values where that says nothing either."""
BUCKET_ELEMENTS = 50_000_000
PERSISTENT_ELEMENTS = 100_000
"""ZeRO 3 leaves parameters with fewer elements on every rank."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    accelerator: Any
    rank: int
    size: int
    local_size: int
    device: torch.device
    node: dist.ProcessGroup | None
    """This node's ranks; None where one node is the world."""


def reconcile_launcher(config: RunConfig) -> RunConfig:
    """The run with what its config leaves to the launcher filled in: ZeRO stage and offload.

    Raises:
        UserError: two values disagree; both are named. Or precision, offload or compilation cannot run here.
    """
    values = config.model_dump()
    for variable, key in LAUNCHER_FIELDS.items():
        theirs = os.environ.get(variable, "none")
        section, name = _find(values, key)
        if theirs in ("auto", "none", "no"):
            continue
        if section[name] is None:
            section[name] = int(theirs) if theirs.isdigit() else theirs
            continue
        # The launcher always exports its defaults, which say nothing.
        is_default = theirs in ("1", "1.0") and key != "training.zero_stage"
        if not is_default and not _equal(theirs, section[name]):
            raise UserError(
                f"{key} is {section[name]} in the config and {theirs} in the launcher ({variable}); "
                f"make them equal or remove one of the two"
            )
    for key, default in DEFAULTS.items():
        section, name = _find(values, key)
        section[name] = default if section[name] is None else section[name]
    run = validate_config(values, "config and launcher")
    training, stage = run.training, run.training.zero_stage
    _check_offload(run)
    if run.model.compile and stage == 3:
        raise UserError("model.compile does not go with ZeRO stage 3, which gathers parameters in between; use 1 or 2")
    if run.model.compile and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "model.compile: needs a C++ compiler on a CPU and finds no g++; install one, or set it to false"
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
            raise UserError(f"training.offload.{what} needs ZeRO stage 3, and the run is at {stage}; use zero_stage 3")
    if offload.optimizer == "nvme" and training.ema_decay > 0:
        raise UserError(
            "training.ema_decay: the average would be all that is not on NVMe; set it to 0, or offload to cpu"
        )
    if offload.parameters == "nvme" and not torch.cuda.is_available():
        # Where the accelerator has no fp16, DeepSpeed writes them as bf16 and trains on what it reads back.
        raise UserError("training.offload.parameters: nvme rounds weights to bf16 on a CPU; use none or cpu")
    if offload.parameters == "nvme" and run.objective.uses_teacher:
        raise UserError(
            "training.offload.parameters: a teacher's weights take the place of parameters in memory, where nvme has "
            "none; use none or cpu, or train without a teacher"
        )
    if "nvme" in (offload.optimizer, offload.parameters):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                "training.offload: nvme needs libaio with its headers (Debian: libaio-dev) and a C++ compiler; install "
                "them, or offload to cpu"
            )


def start_world(config: RunConfig) -> World:
    """Join the other processes, as `accelerate launch` started them; alone if nothing did.

    Args:
        config: The run as `reconcile_launcher` returned it.

    Raises:
        UserError: the processes that came up are not those that were launched.
    """
    import deepspeed
    from accelerate import Accelerator, InitProcessGroupKwargs

    # On a CPU DeepSpeed would compile a reduction for inference at first start, and fail without a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in list(os.environ):
        # From here on the run's config is the only source; Accelerate refuses to have two.
        if name in LAUNCHER_FIELDS or name.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS")):
            del os.environ[name]
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    launched, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    use_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    # Accelerate skips DeepSpeed altogether where this is set; DeepSpeed chooses the CPU by itself.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if not use_cuda:
        torch.set_num_threads(max(1, usable_cores() // local_size))
    backend, timeout = "nccl" if use_cuda else "gloo", timedelta(seconds=2 * config.training.stall_timeout)
    if _restarts() > 0:
        # The launcher's store still holds the addresses of the lost ranks, where new ones would look for each other.
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        store = PrefixStore(f"start{_restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    accelerator = Accelerator(
        deepspeed_plugin=_plugin(deepspeed_config(config)),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend=backend,
                # The last resort: the watchdog has ended the run long before.
                timeout=timeout,
            )
        ],
        mixed_precision="no",
    )
    came_up = dist.get_world_size() if dist.is_initialized() else 1
    if came_up != launched or accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes and {came_up} found each other; start them with "
            "`accelerate launch --config_file` and one of the files in launch/accelerate/"
        )
    return World(
        accelerator, dist.get_rank(), launched, local_size, accelerator.device, _node_group(launched, local_size)
    )


def connect_store() -> Store:
    """A client of the store that the ranks found each other through, which no collective waits in."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # What lost ranks wrote is not for those that the launcher started in their place.
    prefix = f"dist_pca/{_restarts()}"
    return PrefixStore(prefix, TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30)))


def _restarts() -> int:
    """How often the launcher has started these ranks again; its store outlives them."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join_ranks() -> tuple[int, int, torch.device]:
    """Rank, world size and device of a process that runs a network but trains none, without DeepSpeed."""
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), size, device


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from a reconciled run and nothing else."""
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


def _plugin(values: dict[str, Any]) -> Any:
    from accelerate import DeepSpeedPlugin

    class Plugin(DeepSpeedPlugin):  # type: ignore[misc]
        """Accelerate's plugin without its call into transformers, which serves that library's models alone."""

        def set_deepspeed_weakref(self) -> None:
            return

    return Plugin(hf_ds_config=values, zero3_init_flag=False)


def _node_group(size: int, local_size: int) -> dist.ProcessGroup | None:
    if size == local_size:
        return None
    first_ranks = range(0, size, local_size)
    groups = [dist.new_group(list(range(first, first + local_size))) for first in first_ranks]
    return groups[dist.get_rank() // local_size]  # type: ignore[return-value]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
