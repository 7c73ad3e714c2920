"""The fused kernels are the plain formulas, on whatever runs them.

On a GPU they run compiled. Elsewhere Triton interprets them, which it must know before it is imported for the first
time: so one test runs this file again in a process of its own.
"""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_pca.association import cycle_association, triton_launch
from dist_pca.association.triton_launch import TritonKernels
from tests.association.kernel_rows import (
    DEVICE,
    INTERPRETED,
    TOLERANCE,
    TYPES,
    assert_backward,
    assert_matches,
    assert_near,
    largest_product,
    rows,
)
from tests.support.ranks import run_on_ranks


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


sizes = st.sampled_from([1, 2, 31, 33, 70, 129]) | st.integers(1, 100)
widths = st.sampled_from([11, 19, 40, 1, 16, 32, 64, 65])


@on_device
@settings(max_examples=8)
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
@settings(max_examples=8)
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


def drawn_ranks() -> list[dict[str, Any]]:
    """Inputs of two ranks whose pixels are of three clusters, uneven in number."""
    centres = torch.randn(3, 19, generator=torch.Generator().manual_seed(5))
    inputs = []
    for rank, (n, m) in enumerate([(33, 20), (7, 41)]):
        s, t = torch.arange(n) % 3, torch.arange(m) % 3
        drawn = [centres[of] + rows(len(of), 19, torch.float32, 10 * rank + i, 4) for i, of in enumerate((s, t, s, t))]
        weights = torch.linspace(0, 1, m)
        inputs.append(
            {
                "source": drawn[0],
                "target": drawn[1],
                "labels": s,
                "target_classes": t,
                "target_weights": weights,
                "guide": (drawn[2], drawn[3]),
            }
        )
    return inputs


def associated(inputs: dict[str, Any], implementation: Any, communication: Any, refined: bool) -> list[torch.Tensor]:
    """Loss and the gradient of a matrix that all pixels pass."""
    weight = torch.eye(19, requires_grad=True)
    own = dict(inputs) if refined else {name: inputs[name] for name in ("source", "target", "labels")}
    own |= {name: own[name] @ weight for name in ("source", "target")}
    switches: dict[str, Any] = {"class_balanced": refined, "class_weights": "kept_share" if refined else None}
    found = cycle_association(
        **own, num_classes=3, implementation=implementation, communication=communication, **switches
    )
    assert int(found.kept) > 0
    found.loss.backward()
    assert weight.grad is not None
    return [found.loss.detach(), weight.grad]


def kernels_on_a_rank(rank: int, ranks: int) -> list[list[torch.Tensor]]:
    results = []
    for communication, refined in product(("gather", "ring"), (False, True)):
        loss, gradient = associated(drawn_ranks()[rank], "triton", communication, refined)
        for value in (loss, gradient):
            dist.all_reduce(value)
        results.append([loss / ranks, gradient / ranks])
    return results


@pytest.mark.skipif(not INTERPRETED, reason="two ranks share no GPU; the interpreter's process runs it")
def test_kernels_on_two_ranks_are_the_definition_in_one_process(tmp_path: Path) -> None:
    one, two = drawn_ranks()
    joined: dict[str, Any] = {name: torch.cat([one[name], two[name]]) for name in one if name != "guide"}
    joined["guide"] = tuple(torch.cat(sides) for sides in zip(one["guide"], two["guide"], strict=True))
    expected = [associated(joined, "reference", "local", refined) for refined in (False, True)]
    for found in run_on_ranks(kernels_on_a_rank, 2, tmp_path):
        for (loss, gradient), (expected_loss, expected_gradient) in zip(found, 2 * expected, strict=True):
            torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
            assert_near(gradient, expected_gradient, 1e-4 * float(expected_gradient.abs().max()))


def test_only_a_gpu_or_the_interpreter_can_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_launch.can_run(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_launch.can_run(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not triton_launch.can_run(torch.device("cpu"))
