"""The fused kernels are the plain formulas, on whatever runs them.

On a GPU they run compiled. Elsewhere Triton interprets them, which it must know before it is imported for the first
time: so one test runs this file again in a process of its own.
"""

import math
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_pca.association import cycle_association, triton_launch
from dist_pca.association.tiles import BlockMatch
from dist_pca.association.triton_launch import TritonKernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def on_device(test: Any) -> Any:
    """Run a test interpreted where Triton interprets, and otherwise on a GPU that has what the kernels need."""
    if INTERPRETED:
        return test
    older = torch.cuda.is_available() and not triton_launch.can_run(DEVICE)
    return pytest.mark.gpu(pytest.mark.skipif(older, reason="the GPU is older than Ampere")(test))


pytest.importorskip("triton", reason="PyTorch brings Triton on Linux alone")


@pytest.mark.skipif(
    torch.cuda.is_available() or INTERPRETED,
    reason="the kernels' tests are not skipped here, so a process of their own would repeat them",
)
def test_kernels_are_the_formulas_when_interpreted() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__))],
        # One thread: the interpreter's products are small.
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout


def rows(n: int, channels: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * x / math.sqrt(channels)).to(dtype).to(DEVICE)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """Nowhere further apart than `bound`, which says of what size the parts of a sum were."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    assert bool((error <= bound).all()), f"{float(error.max())} apart, at most {bound} allowed"


def largest_product(query: torch.Tensor, key: torch.Tensor) -> float:
    """Bound on the products, before their parts cancel: rounding is relative to it."""
    return float(query.double().norm(dim=1).max() * key.double().norm(dim=1).max())


def assert_matches(found: BlockMatch, query: torch.Tensor, key: torch.Tensor, tolerance: float) -> None:
    z = query.double() @ key.double().T
    size = largest_product(query, key)
    assert found.key_index.dtype == torch.int64
    assert_near(found.logit, z.amax(dim=1), tolerance * size)
    # A product that rounding may have put above the largest is as good an answer.
    assert_near(z.gather(1, found.key_index[:, None])[:, 0], z.amax(dim=1), tolerance * size)
    if found.logsumexp is not None:
        assert_near(found.logsumexp, z.logsumexp(dim=1), tolerance * (1 + size))


def assert_backward(
    query: torch.Tensor, key: torch.Tensor, weighted: torch.Tensor, deterministic: bool, tolerance: float
) -> None:
    z = query.double() @ key.double().T
    logsumexp = z.logsumexp(dim=1)
    p = torch.exp(z - logsumexp[:, None])
    # Exponentials are as uncertain as products.
    tolerance = max(tolerance, 1e-6 * largest_product(query, key))
    before = rows(len(key), key.shape[1], torch.float32, seed=99)
    key_gradient = before.clone()
    query_sum = TritonKernels(deterministic).backward(query, key, weighted, logsumexp.float(), key_gradient)
    assert query_sum.dtype == torch.float32
    assert_near(query_sum, p @ key.double(), tolerance * (p @ key.double().abs()))
    added = key_gradient.double() - before.double()
    assert_near(added, p.T @ weighted.double(), tolerance * (p.T @ weighted.double().abs()) + 1e-6 * before.abs())


sizes = st.sampled_from([1, 2, 31, 33, 70, 129]) | st.integers(1, 100)
widths = st.sampled_from([11, 19, 40, 1, 16, 32, 64, 65])


@on_device
@settings(max_examples=12)
@given(
    n=sizes, m=sizes, channels=widths, dtype=st.sampled_from(TYPES), logsumexp=st.booleans(), seed=st.integers(0, 99)
)
@example(n=5, m=300, channels=19, dtype=torch.float32, logsumexp=True, seed=0)
def test_match_is_the_plain_formula(
    n: int, m: int, channels: int, dtype: torch.dtype, logsumexp: bool, seed: int
) -> None:
    query, key = rows(n, channels, dtype, seed, scale=5), rows(m, channels, dtype, seed + 1)
    found = TritonKernels().match(query, key, logsumexp=logsumexp)
    assert (found.logsumexp is not None) == logsumexp
    # The input is what it is, so products of bf16 rows are exact to fp32 too.
    assert_matches(found, query, key, 1e-5)


@on_device
@settings(max_examples=12)
@given(
    n=sizes,
    m=sizes,
    channels=widths,
    dtype=st.sampled_from(TYPES),
    deterministic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backward_is_the_plain_formula(
    n: int, m: int, channels: int, dtype: torch.dtype, deterministic: bool, seed: int
) -> None:
    query, key, weighted = (rows(size, channels, dtype, seed + i, 3) for i, size in enumerate((n, m, n)))
    assert_backward(query, key, weighted, deterministic, TOLERANCE[dtype])


@on_device
@settings(max_examples=5)
@given(n=sizes, m=sizes, channels=widths, dtype=st.sampled_from(TYPES), seed=st.integers(0, 99))
@example(n=140, m=200, channels=40, dtype=torch.bfloat16, seed=0)
def test_backward_of_wide_rows_is_the_plain_formula(
    n: int, m: int, channels: int, dtype: torch.dtype, seed: int
) -> None:
    query, key, weighted = (rows(size, channels, dtype, seed + i, 3) for i, size in enumerate((n, m, n)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "FUSED_CHANNELS", {torch.float32: 0, torch.bfloat16: 0})
        # Several tiles of 64 x 64.
        patch.setattr(triton_launch, "SCRATCH_BYTES", 64 * 64 * dtype.itemsize)
        assert_backward(query, key, weighted, False, TOLERANCE[dtype])


@on_device
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_wider_than_one_block_of_channels_match_and_backward(dtype: torch.dtype) -> None:
    query, key = rows(9, 331, dtype, 0, scale=5), rows(21, 331, dtype, 1)
    assert_matches(TritonKernels().match(query, key, logsumexp=True), query, key, 1e-5)
    assert_backward(query, key, rows(9, 331, dtype, 2), False, TOLERANCE[dtype])


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_shared_out_among_many_programs_match_and_backward(
    dtype: torch.dtype, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for waves in ("MATCH_WAVES", "BACKWARD_WAVES"):
        monkeypatch.setattr(triton_launch, waves, 64)
    query, key = rows(200, 19, dtype, 0, scale=5), rows(300, 19, dtype, 1)
    assert triton_launch._chunks(200, 300, DEVICE, triton_launch.BACKWARD_WAVES) == (128, 3)
    assert_matches(TritonKernels().match(query, key, logsumexp=True), query, key, 1e-5)
    assert_backward(query, key, rows(200, 19, dtype, 2), deterministic, TOLERANCE[dtype])


@on_device
@pytest.mark.parametrize("waves", [0, 64])
def test_ties_go_to_the_lowest_index(waves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # All keys by one program, or shared out among three.
    monkeypatch.setattr(triton_launch, "MATCH_WAVES", waves)
    key = torch.zeros(300, 12, device=DEVICE)
    key[[7, 9, 100, 250], 0] = 1.0
    key[[280, 299], 1] = 1.0
    query = torch.zeros(4, 12, device=DEVICE)
    query[0, 0], query[1, 1], query[2, 0] = 1.0, 2.0, -1.0
    assert TritonKernels().match(query, key, logsumexp=False).key_index.tolist() == [7, 280, 0, 0]


@on_device
@settings(max_examples=5)
@given(n=st.integers(1, 40), first=st.integers(1, 60), second=st.integers(1, 60), seed=st.integers(0, 99))
def test_two_parts_of_the_keys_combine_to_the_whole(n: int, first: int, second: int, seed: int) -> None:
    query, key = rows(n, 19, torch.float32, seed, scale=5), rows(first + second, 19, torch.float32, seed + 1)
    whole, one, two = (TritonKernels().match(query, part, logsumexp=True) for part in (key, key[:first], key[first:]))
    assert whole.logsumexp is not None
    assert one.logsumexp is not None
    assert two.logsumexp is not None
    size = largest_product(query, key)
    assert_near(torch.logaddexp(one.logsumexp, two.logsumexp), whole.logsumexp, 1e-5 * (1 + size))
    assert_near(torch.maximum(one.logit, two.logit), whole.logit, 1e-6 * size)
    index = torch.where(two.logit > one.logit, first + two.key_index, one.key_index)
    assert torch.equal(index, whole.key_index)


@on_device
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [19, 40, 300])
def test_deterministic_backward_passes_agree_bit_by_bit(channels: int, dtype: torch.dtype) -> None:
    query, key, weighted = (rows(n, channels, dtype, seed) for seed, n in enumerate((50, 70, 50)))
    logsumexp = TritonKernels().match(query, key, logsumexp=True).logsumexp
    assert logsumexp is not None
    results = []
    for _ in range(2):
        key_gradient = torch.zeros(70, channels, device=DEVICE)
        results.append((TritonKernels(True).backward(query, key, weighted, logsumexp, key_gradient), key_gradient))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    without_key_gradient = TritonKernels(True).backward(query, key, weighted, logsumexp, None)
    assert torch.equal(without_key_gradient, results[0][0])


@on_device
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_products_in_the_thousands_stay_finite(dtype: torch.dtype, deterministic: bool, sign: float) -> None:
    # All products of one sign, near +-1000: the logarithm of their sum is far from that of absent rows' zero products.
    channels = torch.arange(11, device=DEVICE)
    query = (sign * (30 + rows(37, 11, torch.float32, 0))).to(dtype)
    key = (3 + 0.1 * rows(45, 11, torch.float32, 1) + 0 * channels).to(dtype)
    z = query.double() @ key.double().T
    assert float((sign * z).min()) > 900
    found = TritonKernels().match(query, key, logsumexp=True)
    assert_matches(found, query, key, 1e-5)
    assert found.logsumexp is not None
    key_gradient = torch.zeros(45, 11, device=DEVICE)
    query_sum = TritonKernels(deterministic).backward(query, key, query, found.logsumexp, key_gradient)
    p = z.softmax(dim=1)
    # One unit in the last place of a product is 6e-5, and its exponential is as uncertain.
    tolerance = max(1e-3, TOLERANCE[dtype])
    assert_near(query_sum, p @ key.double(), tolerance * (p @ key.double().abs()))
    assert_near(key_gradient, p.T @ query.double(), tolerance * (p.T @ query.double().abs()))


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [19, 300])
def test_no_query_rows_give_empty_results(channels: int, deterministic: bool) -> None:
    query, key = rows(0, channels, torch.bfloat16, 0), rows(5, channels, torch.bfloat16, 1)
    found = TritonKernels().match(query, key, logsumexp=True)
    assert found.logsumexp is not None
    assert [len(part) for part in (found.logit, found.key_index, found.logsumexp)] == [0] * 3
    key_gradient = torch.ones(5, channels, device=DEVICE)
    query_sum = TritonKernels(deterministic).backward(query, key, query, found.logsumexp, key_gradient)
    assert query_sum.shape == (0, channels)
    assert torch.equal(key_gradient, torch.ones_like(key_gradient))


@on_device
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_association_through_the_kernels_is_the_definition(similarity: Any, dtype: Any) -> None:
    labels = torch.arange(70, device=DEVICE) % 3
    centres = torch.randn(3, 19, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    domains = [(centres[labels] + rows(70, 19, torch.float32, seed, scale=4)) for seed in (0, 1)]
    if similarity == "kl":
        domains = [x.softmax(dim=1) for x in domains]
    results = []
    for implementation, products in (("reference", "fp32"), ("triton", dtype)):
        source, target = (x.clone().requires_grad_() for x in domains)
        options: dict[str, Any] = {"similarity": similarity, "implementation": implementation, "dtype": products}
        found = cycle_association(source, target, labels, num_classes=3, detach_statistics=False, **options)
        found.loss.backward()
        assert source.grad is not None
        assert target.grad is not None
        results.append((found.loss.detach(), source.grad, target.grad))
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    torch.testing.assert_close(results[1][0], results[0][0], rtol=tolerance, atol=0)
    if dtype == "fp32":
        for gradient, expected in zip(results[1][1:], results[0][1:], strict=True):
            assert_near(gradient, expected, 1e-4 * float(expected.abs().max()))


@on_device
@pytest.mark.parametrize(("similarity", "guide_keys"), [("cosine", True), ("kl", False)])
def test_refinements_through_the_kernels_are_the_definition(similarity: Any, guide_keys: bool) -> None:
    labels = torch.arange(40, device=DEVICE) % 3
    centres = torch.randn(3, 19, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    domains = [(centres[labels] + rows(40, 19, torch.float32, seed, scale=4)) for seed in range(4)]
    if similarity == "kl":
        domains = [x.softmax(dim=1) for x in domains]
    results = []
    for implementation in ("reference", "triton"):
        source, target = (x.clone().requires_grad_() for x in domains[:2])
        options: dict[str, Any] = {"similarity": similarity, "implementation": implementation, "guide_keys": guide_keys}
        found = cycle_association(
            source,
            target,
            labels,
            num_classes=3,
            target_classes=labels,
            target_weights=torch.linspace(0, 1, 40, device=DEVICE),
            class_balanced=True,
            guide=(domains[2], domains[3]),
            detach_statistics=False,
            **options,
        )
        assert int(found.kept) > 0
        found.loss.backward()
        assert source.grad is not None
        assert target.grad is not None
        results.append((found.loss.detach(), source.grad, target.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    for gradient, expected in zip(results[1][1:], results[0][1:], strict=True):
        assert_near(gradient, expected, 1e-4 * float(expected.abs().max()))


def test_only_a_gpu_or_the_interpreter_can_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_launch.can_run(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_launch.can_run(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not triton_launch.can_run(torch.device("cpu"))


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
