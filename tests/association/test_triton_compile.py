"""The fused kernels compile for GPUs that are not here, and a program of each fits into their memory."""

import os
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_pca.association import triton_launch
from tests.association.kernel_rows import INTERPRETED

pytest.importorskip("triton", reason="PyTorch brings Triton on Linux alone")

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 86: 99 << 10}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "match": ("match_kernel", {"LOGSUMEXP": True}),
    "probability": ("probability_kernel", {}),
    "query side": ("backward_kernel", {"KEYS_STATIONARY": False, "ATOMIC": False}),
    "key side": ("backward_kernel", {"KEYS_STATIONARY": True, "ATOMIC": False}),
    "atomic": ("backward_kernel", {"KEYS_STATIONARY": True, "ATOMIC": True}),
}


def takes(variant: str, channels: int, type_name: str) -> bool:
    """Whether rows of this width go through the kernel; wider ones take another route."""
    name, constants = VARIANTS[variant]
    limit = triton_launch.FUSED_CHANNELS[torch.bfloat16 if type_name == "bf16" else torch.float32]
    return name != "backward_kernel" or channels <= (triton_launch.ATOMIC_CHANNELS if constants["ATOMIC"] else limit)


INPUTS = {"query", "key", "stationary", "streaming", "values", "probability"}
SUMS = {"logit", "logsumexp", "stationary_sum", "streaming_sum"}


def compiled(kernel: Any, capability: int, type_name: str, shape: Any, constants: dict[str, Any]) -> tuple[int, int]:
    """Shared memory of a program and bytes of spilled registers of a thread, of a kernel compiled without a GPU.

    None of its tensor core instructions may wait for the one before.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **shape.kwargs}
    pointers = dict.fromkeys(INPUTS, "*" + type_name) | dict.fromkeys(SUMS, "*fp32") | {"index": "*i64"}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
        constants,
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers},
    )
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
    report = subprocess.run(
        [assembler, "-v", f"--gpu-name={architecture}", "-", "-o", os.devnull],
        input=binary.asm["ptx"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "serialized" not in report, report
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert spilled is not None, report
    return binary.metadata.shared, int(spilled[1])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing while its interpreter is on; the run without it does")
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize(
    ("variant", "channels", "type_name"),
    [case for case in product(VARIANTS, [32, 256, 2048], ["bf16", "fp32"]) if takes(*case)],
)
def test_kernels_compile_and_fit(variant: str, channels: int, type_name: str, capability: int) -> None:
    from dist_pca.association import triton_kernels

    name, constants = VARIANTS[variant]
    kernel = getattr(triton_kernels, name)
    shapes = triton_kernels.shapes(kernel, type_name == "bf16", channels)
    # GPUs with little shared memory need one shape that fits; the first and the last must fit the others.
    for shape in shapes[-1:] if capability == 86 else (shapes[0], shapes[-1]):
        shared, spilled = compiled(kernel, capability, type_name, shape, {**constants, "C": channels})
        assert shared <= SHARED_BYTES[capability], shape
        assert spilled <= 64, shape
