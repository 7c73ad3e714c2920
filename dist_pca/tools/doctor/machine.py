"""What one rank can say of its own machine."""

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from dist_pca.config import RunConfig
from dist_pca.console import counted
from dist_pca.cores import available_memory, free_shared_memory, usable_cores
from dist_pca.data.addresses import is_remote, redact
from dist_pca.data.cache import cache_settings, open_manifest
from dist_pca.errors import UserError
from dist_pca.tools.doctor.check import VERSIONS, Check
from dist_pca.tools.planning.predict import images_per_rank
from dist_pca.training.accumulation import fit_accumulation
from dist_pca.training.limits import lack_of_shared_memory, shared_memory_bytes
from dist_pca.training.run_folder import PACKAGES

LEAST_MEMORY, LEAST_SHARED = 4e9, 1e9
"""Free bytes of memory and shared memory below which many runs do not fit."""
ENOUGH_DISK, LEAST_DISK = 20e9, 1e9
"""Free bytes below which a run may not have the space for its checkpoints, and below which it has not."""


def machine_checks(config: RunConfig | None, world_size: int, folder: Path) -> list[Check]:
    """All that needs no other rank.

    Args:
        config: The run that is to be trained; None looks at the machine alone.
        world_size: Ranks that it is to be trained on.
        folder: Where runs are to be written.
    """
    checks = [versions(), gpus(), backends(), deepspeed_operations(config), disk(folder), memory()]
    checks.append(shared_memory(config, world_size))
    if config is not None:
        checks += [batches(config, world_size), *(shards(config, domain) for domain in ("source", "target"))]
    return checks


def versions() -> Check:
    """Python and the packages that a run depends on; all ranks must have the same."""
    found, missing = [f"python {platform.python_version()}"], []
    for package in ("dist-pca", *PACKAGES):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Check(VERSIONS, "fail", f"missing: {', '.join(missing)}", "pip install dist-pca into this environment")
    return Check(VERSIONS, "pass", ", ".join(found))


def gpus() -> Check:
    """GPUs that this process sees, and whether torch can use them."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return Check("gpus", "pass", "none; runs use the CPU over gloo")
        return Check(
            "gpus",
            "fail",
            f"there is a driver, but torch {torch.__version__} sees no GPU",
            "install a torch that fits the driver's CUDA version, and look at CUDA_VISIBLE_DEVICES",
        )
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        return Check("gpus", "fail", f"{count} GPUs for local rank {local_rank}", "start one process for each GPU")
    free, total = torch.cuda.mem_get_info(local_rank)
    found = f"{count} x {torch.cuda.get_device_name(local_rank)}, {total / 1e9:.0f} GB"
    if free < 0.9 * total:
        taken = f"{found}, of which {(total - free) / 1e9:.1f} GB are taken"
        return Check("gpus", "warn", taken, "end what else runs there; nvidia-smi names it")
    values = torch.ones(256, device=f"cuda:{local_rank}")
    if float((values * 2).sum()) != 512.0:
        return Check("gpus", "fail", f"{found}: computes wrongly", "take this GPU out of service")
    return Check("gpus", "pass", found)


def backends() -> Check:
    """What ranks could speak through."""
    if not dist.is_available() or not dist.is_gloo_available():
        return Check("backends", "fail", "torch was built without gloo", "install torch from its usual wheels")
    if torch.cuda.is_available() and not dist.is_nccl_available():
        return Check("backends", "fail", "torch was built without NCCL", "install torch from its CUDA wheels")
    if not torch.cuda.is_available():
        return Check("backends", "pass", "gloo")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Check("backends", "pass", f"gloo, NCCL {nccl}")


def deepspeed_operations(config: RunConfig | None) -> Check:
    """Whether a run would have to compile anything, and whether it could."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    there = f"a C++ compiler is at {compiler}" if compiler else "there is no C++ compiler"
    name = "compiled code"
    if config is None:
        return Check(name, "pass", f"DeepSpeed compiles nothing for a run without NVMe; {there}")
    needs = []
    if "nvme" in (config.training.offload.optimizer, config.training.offload.parameters):
        builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
        if not builder.is_compatible():
            return Check(
                name,
                "fail",
                "training.offload to nvme needs DeepSpeed's async_io, which cannot be built here",
                "install libaio's headers (libaio-dev) and a C++ compiler, or offload to cpu",
            )
        needs.append("DeepSpeed's async_io for NVMe")
    if config.model.compile:
        needs.append("model.compile")
    if torch.cuda.is_available() and config.objective.association.dtype == "bf16":
        needs.append("Triton's kernels for association")
    if not needs:
        return Check(name, "pass", f"the run compiles nothing; {there}")
    if compiler is None:
        return Check(
            name,
            "fail",
            f"{', '.join(needs)} must be compiled, and {there}",
            "load or install a compiler (g++), or set CXX to one",
        )
    return Check(name, "pass", f"compiled at first start: {', '.join(needs)}; {there}")


def disk(folder: Path) -> Check:
    """Space for the run folder and for temporary files."""
    found, least = [], float("inf")
    for place in (folder, Path(tempfile.gettempdir())):
        existing = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.is_dir())
        if not os.access(existing, os.W_OK):
            return Check("disk", "fail", f"{existing} is not writable", "set another output=, or fix its permissions")
        free = shutil.disk_usage(existing).free
        least = min(least, free)
        found.append(f"{free / 1e9:.1f} GB free at {place}")
    text = ", ".join(dict.fromkeys(found))
    remedy = "make space, or choose another output= or TMPDIR"
    if least < LEAST_DISK:
        return Check("disk", "fail", text, remedy)
    return Check("disk", "warn", text, remedy) if least < ENOUGH_DISK else Check("disk", "pass", text)


def memory() -> Check:
    """Cores and memory that this process may use, which a container may limit."""
    cores, there, free = usable_cores(), os.cpu_count() or 1, available_memory()
    text = f"{free / 1e9:.1f} GB of memory free, {cores} of {there} cores usable"
    if free < LEAST_MEMORY:
        return Check("memory", "warn", text, "give the container or job more memory, or end what else runs there")
    return Check("memory", "pass", text)


def shared_memory(config: RunConfig | None, world_size: int) -> Check:
    """Room in /dev/shm for the batches of loader processes."""
    free = free_shared_memory()
    if free is None:
        return Check("shared memory", "pass", "no /dev/shm here")
    found = f"{free / 1e6:,.0f} MB free in /dev/shm"
    if config is not None:
        # Shards that cannot be read have a line of their own.
        with suppress(UserError):
            lack = lack_of_shared_memory(
                _shared_bytes(config, world_size), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            )
            return Check("shared memory", "pass", found) if lack is None else _failure("shared memory", lack)
    if free < LEAST_SHARED:
        remedy = "give the container more (docker run --shm-size), or set data.workers=0"
        return Check("shared memory", "warn", found, remedy)
    return Check("shared memory", "pass", found)


def _failure(name: str, message: str) -> Check:
    found, _, remedy = message.rpartition("; ")
    return Check(name, "fail", found, remedy)


def _shared_bytes(config: RunConfig, world_size: int) -> int:
    cache = cache_settings(config.data.cache)
    sources = [open_manifest(folder, cache) for folder in config.data.folders("source")]
    targets = [open_manifest(folder, cache) for folder in config.data.folders("target") if config.objective.adapt]
    validation = None if config.data.validation is None else open_manifest(config.data.validation, cache)
    return shared_memory_bytes(fit_accumulation(config, world_size), sources, targets, validation, world_size)


def batches(config: RunConfig, world_size: int) -> Check:
    """Check that the batches can be divided evenly among the ranks."""
    try:
        source, target = images_per_rank(fit_accumulation(config, world_size), world_size)
    except UserError as error:
        found, _, remedy = str(error).rpartition("; ")
        return Check("batches", "fail", found, remedy)
    images = f"{source} source and {target} target images" if target else f"{source} source images"
    return Check("batches", "pass", f"{images} in each rank's micro-batch")


def shards(config: RunConfig, domain: str) -> Check:
    """Whether a domain's manifests and shards are there, whole by size, and can be read."""
    name = f"{domain} shards"
    folders = config.data.folders(domain)  # type: ignore[arg-type]
    if domain == "target" and not config.objective.adapt:
        return Check(name, "pass", "not used, since objective.adapt is false")
    samples = count = 0
    for location in folders:
        try:
            manifest = open_manifest(location, cache_settings(config.data.cache))
            if not is_remote(location) and manifest.shards:
                _read_ends([manifest.folder / shard.name for shard in (manifest.shards[0], manifest.shards[-1])])
        except UserError as error:
            found, _, remedy = str(error).rpartition("; ")
            return Check(name, "fail", found or str(error), remedy)
        except OSError as error:
            return Check(name, "fail", f"{location}: {error}", "give this user the right to read it on every node")
        samples, count = samples + manifest.samples, count + len(manifest.shards)
    return Check(
        name, "pass", f"{counted(samples, 'sample')} in {counted(count, 'shard')} of {', '.join(map(redact, folders))}"
    )


def _read_ends(files: Sequence[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            opened.read(512)
            opened.seek(-512, os.SEEK_END)
            opened.read(512)
