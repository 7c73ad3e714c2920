"""What machines can do, by their vendors' figures, and which part of it a run is assumed to reach."""

from dataclasses import dataclass

import psutil

from dist_pca.errors import UserError
from dist_pca.training.profiling import PEAK_TERAFLOPS


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are of dense products, without the sparsity that vendors like to count."""

    name: str
    memory: float
    """Bytes."""
    fp32: float
    """Operations per second outside of tensor cores: matrix products of fp32, as PyTorch takes them."""
    tf32: float
    """Operations per second on tensor cores, fp32 rounded to 19 bits: convolutions of fp32, as PyTorch takes them."""
    bf16: float
    """Operations per second of bf16 or fp16 on tensor cores."""
    link: float
    """Bytes per second to other GPUs of the node, one way: NVLink, or PCIe where there is none."""
    network: float
    """Bytes per second and GPU to other nodes, one way: the adapter that such a GPU usually comes with."""


def _gpu(name: str, device: str, memory: float, fp32: float, link: float, network: float) -> Gpu:
    bf16, tf32 = (1e12 * rate for rate in PEAK_TERAFLOPS[device])
    return Gpu(name, memory, fp32, tf32, bf16, link, network)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("v100", "V100", 32e9, 15.7e12, 150e9, 12.5e9),
        _gpu("a10", "A10", 24e9, 31.2e12, 32e9, 6.25e9),
        _gpu("l4", "L4", 24e9, 30.3e12, 32e9, 6.25e9),
        _gpu("rtx4090", "RTX 4090", 24e9, 82.6e12, 32e9, 3.125e9),
        _gpu("l40s", "L40S", 48e9, 91.6e12, 32e9, 12.5e9),
        _gpu("a100-40", "A100", 40e9, 19.5e12, 300e9, 25e9),
        _gpu("a100", "A100", 80e9, 19.5e12, 300e9, 25e9),
        _gpu("h100", "H100", 80e9, 67e12, 450e9, 50e9),
        _gpu("h200", "H200", 141e9, 67e12, 450e9, 50e9),
        _gpu("b200", "B200", 180e9, 80e12, 900e9, 50e9),
    )
}
"""SXM boards where there are such; V100 lacks bf16, its rate is fp16's."""


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. Measure a few steps (`images_per_second` in metrics.jsonl) and put in your own."""

    network_efficiency: float = 0.4
    """Share of the tensor cores' rate that a network's convolutions and products reach, all else it does included."""
    association_efficiency: float = 0.5
    """Share of the rate that the association's products reach."""
    link_efficiency: float = 0.75
    """Share of the links' rate that large collectives reach."""
    latency: float = 2e-5
    """Seconds that a collective takes however small it is, within a node; three times that between nodes."""
    matched: float = 0.22
    """Share of targets that some source pixel matches (`cover_ratio`)."""
    kept: float = 0.72
    """Share of source pixels whose cycle is kept (`kept_ratio` of labelled ones)."""
    loader_rate: float = 30.0
    """Images per second that one loader process reads, decodes and crops."""
    reserve: float = 0.1
    """Share of the GPU's memory that is left for what is no tensor: CUDA's context, NCCL's buffers, cuDNN's
    workspaces, and gaps between tensors."""


@dataclass(frozen=True)
class Cluster:
    """GPUs on nodes."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """Ranks."""
        return self.nodes * self.per_node

    @property
    def ranks_per_device(self) -> int:
        """Ranks that share memory and rates: all of a node where they run on its processor."""
        return self.per_node if self.gpu.name == "cpu" else 1


def find_gpu(name: str) -> Gpu:
    """A GPU by name; `cpu` is this machine's processor, which a node's ranks share, for runs over gloo.

    Raises:
        UserError: there is no entry for it.
    """
    if name == "cpu":
        # Each core multiplies and adds two vectors of eight a cycle at 3 GHz, and twice as many numbers of bf16.
        rate = (psutil.cpu_count(logical=False) or 1) * 96e9
        return Gpu("cpu", float(psutil.virtual_memory().total), rate, rate, 2 * rate, 2e9, 1.25e9)
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not known; take one of {', '.join([*GPUS, 'cpu'])}, and override its figures")
    return GPUS[name]
