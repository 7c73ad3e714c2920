import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.association import diffuse
from dist_pca.association.options import Similarity


def dense(x: torch.Tensor, alpha: float, similarity: Similarity, detach: bool) -> torch.Tensor:
    """Section 3.2 with its n x n matrix, the mean and the entropy left in."""
    if similarity == "cosine":
        unit: torch.Tensor = x / x.norm(dim=-1, keepdim=True)
        d = unit @ unit.mT
        z = d.detach() if detach else d
        d = (d - z.mean(dim=-1, keepdim=True)) / (z.std(dim=-1, keepdim=True) + 1e-10)
    else:
        log = torch.log(x + 1e-10)
        d = -(x[:, :, None] * (log[:, :, None] - log[:, None])).sum(dim=-1)
    return (1 - alpha) * x + alpha * d.softmax(dim=-1) @ x


@settings(max_examples=30)
@given(
    similarity=st.sampled_from(["cosine", "kl"]), n=st.integers(2, 20), detach=st.booleans(), seed=st.integers(0, 1000)
)
def test_value_and_gradient_are_those_of_the_dense_formula(
    similarity: Similarity, n: int, detach: bool, seed: int
) -> None:
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.softmax(dim=-1) if similarity == "kl" else x
    gradients = []
    for result in (
        lambda r: diffuse(r, 0.5, similarity, detach_statistics=detach),
        lambda r: dense(r, 0.5, similarity, detach),
    ):
        rows = x.clone().requires_grad_()
        value = result(rows)
        (value**2 * torch.arange(5)).sum().backward()
        gradients.append((value, rows.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


def test_diffused_probabilities_are_a_distribution() -> None:
    x = torch.randn(3, 11, 4).softmax(dim=-1)
    torch.testing.assert_close(diffuse(x, 0.5, "kl").sum(dim=-1), torch.ones(3, 11))


def test_images_do_not_mix() -> None:
    x = torch.randn(2, 9, 4)
    assert torch.allclose(diffuse(x, 0.5)[:1], diffuse(x[:1], 0.5), atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_alpha_zero_changes_nothing(similarity: Similarity) -> None:
    x = torch.randn(1, 6, 3).softmax(dim=-1)
    assert torch.equal(diffuse(x, 0.0, similarity), x)
