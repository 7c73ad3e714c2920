"""Throughput: floating-point operations of the network, the device's peak rate, peak memory."""

import resource
import sys
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_pca.config import RunConfig

PEAK_TERAFLOPS = {
    "B200": (2250.0, 1100.0),
    "GH200": (989.4, 494.7),
    "H200": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "A40": (149.7, 74.8),
    "A30": (165.0, 82.0),
    "A10": (125.0, 62.5),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "RTX A6000": (154.8, 77.4),
    "MI300X": (1307.4, 653.7),
}
"""Dense peak rates by a part of the device's name, the most specific first: of half precision accumulated in fp32, and
of fp32 as PyTorch convolves it by default, which is TF32 where the device has it."""


def network_flops(model: torch.nn.Module, height: int, width: int) -> int:
    """Count floating-point operations of a forward and backward pass over one image [3, height, width].

    Convolutions and matrix products count, on meta tensors, which takes no memory and a fraction of a second.
    Recomputation by activation checkpointing does not count.
    """
    meta = {
        name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    image = torch.empty(1, 3, height, width, device="meta")
    # In evaluation mode, since synchronised batch norm would communicate.
    training = model.training
    model.eval()
    # Recomputation would run in backward, after the module's own tensors have replaced the meta tensors.
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    for module in checkpointed:
        module.grad_checkpointing = False
    try:
        with FlopCounterMode(display=False) as counter:
            output = torch.func.functional_call(model, meta, (image,))
            output.logits.sum().backward()
    finally:
        model.train(training)
        for module in checkpointed:
            module.grad_checkpointing = True
    return int(counter.get_total_flops())


def network_passes(config: RunConfig) -> float:
    """Number of forward and backward passes of single images in one update, over all ranks.

    Each of the student's views counts as one; a pass of the teacher, or one for running statistics alone, counts as a
    third, as it is forward only.
    """
    objective, training = config.objective, config.training
    if not objective.adapt:
        return training.source_batch
    views = objective.shows_target + (objective.self_training.weight > 0) + (objective.masked_consistency.weight > 0)
    taught = training.target_batch if objective.uses_teacher else 0
    if objective.association.uses_teacher and objective.association.teacher_matches:
        taught += training.source_batch
    if config.model.running_statistics == "target" and not objective.shows_target:
        taught += training.target_batch
    return training.source_batch + views * training.target_batch + taught / 3


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak operations per second of a device at fp32, bf16 or fp16; None if unknown, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = next((rates for part, rates in PEAK_TERAFLOPS.items() if part.lower() in name.lower()), None)
    return None if rates is None else 1e12 * rates[precision == "fp32"]


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, and on macOS bytes.
    return peak if sys.platform == "darwin" else 1024 * peak
