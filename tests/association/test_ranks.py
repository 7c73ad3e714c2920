"""Any number of ranks is one process."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_pca.association import Association, cycle_association, cycle_association_pairs
from dist_pca.association.options import Communication, Implementation, Precision, Similarity
from dist_pca.config import Scope
from tests.association.pixels import CLASSES, domain, labels_of, refinements
from tests.support.ranks import run_on_ranks

SIZES = [(11, 7), (5, 9), (8, 4), (3, 12)]
"""Source and target pixels of each rank: uneven on purpose."""
CHANNELS = 6
COMMUNICATIONS: tuple[Communication, ...] = ("gather", "ring")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
Case = tuple[Similarity, Scope, Communication, Implementation, bool, str]
"""Similarity, scope, communication, implementation, detach_statistics, refinement."""
REFINEMENTS: dict[str, dict[str, Any]] = {
    "": {},
    "classes": {"classes": True},
    "weights": {"weights": True},
    "balanced": {"class_balanced": True},
    "kept share": {"classes": True, "class_balanced": True, "class_weights": "kept_share"},
    "guide": {"guide": True},
    "keys": {"guide": True, "guide_keys": True},
    "all": {"classes": True, "weights": True, "guide": True, "class_balanced": True, "class_weights": "kept_share"},
    "all, keys": {
        **dict.fromkeys(("classes", "weights", "guide", "guide_keys", "class_balanced"), True),
        "class_weights": tuple(1.0 + k for k in range(CLASSES)),
    },
}
REFINED = list(REFINEMENTS)[1:]


def cases(
    similarities: Sequence[Similarity],
    scopes: Sequence[Scope],
    communications: Sequence[Communication],
    implementations: Sequence[Implementation],
    detached: Sequence[bool],
    refinement_names: Sequence[str],
) -> list[Case]:
    """Every combination."""
    return list(product(similarities, scopes, communications, implementations, detached, refinement_names))


CASES = [
    *cases(("cosine", "kl"), ("node", "world"), COMMUNICATIONS, ("blockwise",), (True, False), ("",)),
    *cases(("cosine", "kl"), ("node", "world"), ("gather",), ("reference",), (True,), ("",)),
    *cases(("cosine", "kl"), ("rank",), ("local",), ("blockwise", "reference"), (True,), ("",)),
    *cases(("cosine",), ("world",), COMMUNICATIONS, ("blockwise",), (False,), REFINED),
    *cases(("kl",), ("node",), COMMUNICATIONS, ("blockwise", "online_softmax"), (False,), ("all", "all, keys")),
    *cases(("cosine",), ("world",), ("gather",), ("reference", "online_softmax"), (True,), ("all", "all, keys")),
    *cases(("cosine",), ("rank",), ("local",), ("blockwise", "reference"), (True,), REFINED),
]
PAIR_CASES = cases(
    ("cosine", "kl"), ("pair",), ("local",), ("blockwise", "reference"), (True,), ("", "kept share", "all, keys")
)


def pixels(similarity: Similarity, ranks: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    sizes = list(enumerate(SIZES[:ranks]))
    labels = [labels_of(n, rank) for rank, (n, _) in sizes]
    # The last rank's pixels are all ignored: it keeps no cycle.
    labels[-1] = torch.full_like(labels[-1], 255)
    sources = [domain(n, CHANNELS, similarity, rank) for rank, (n, _) in sizes]
    return sources, [domain(n, CHANNELS, similarity, 10 + rank) for rank, (_, n) in sizes], labels


def nodes(ranks: int) -> list[list[int]]:
    """Two ranks on each, one on the last if they are odd."""
    return [[rank for rank in range(ranks) if rank // 2 == node] for node in range((ranks + 1) // 2)]


def through(weight: torch.Tensor, rows: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """A parameter that all ranks share, so that gradients meet as they do in a model."""
    return rows @ weight if similarity == "cosine" else (rows @ weight).abs()


def numbers(found: Association) -> torch.Tensor:
    ratios = [
        found.cover_ratio,
        found.consistent_ratio,
        found.kept_ratio,
        found.correct_ratio,
        found.mutual_information_bound,
        found.kept,
    ]
    ratios += [found.kept_correct_ratio, *found.confusion.flatten(), *found.kept_confusion.flatten()]
    of_classes = found.kept_per_class.tolist() + found.kept_share.tolist()
    return torch.tensor([float(value) for value in ratios] + of_classes, dtype=torch.float64)


def refined(case: Case, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Optional inputs of a rank, and switches that are the same on all."""
    chosen = dict(REFINEMENTS[case[-1]])
    names = ("class_balanced", "class_weights", "guide_keys")
    switches: dict[str, Any] = {name: chosen.pop(name) for name in names if name in chosen}
    return refinements(*SIZES[rank], CHANNELS, case[0], 20 + rank, **chosen), switches


def all_cases(rank: int, ranks: int) -> list[dict[str, Any]]:
    groups = [dist.new_group(members) for members in nodes(ranks)]
    node = groups[rank // 2]
    assert isinstance(node, dist.ProcessGroup)
    return [one_rank(rank, ranks, node, case) for case in CASES]


def one_rank(rank: int, ranks: int, node: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    similarity, scope, communication, implementation, detach, _ = case
    own, switches = refined(case, rank)
    sources, targets, labels = pixels(similarity, ranks)
    weight = torch.eye(CHANNELS, dtype=torch.float64, requires_grad=True)
    found = cycle_association(
        through(weight, sources[rank], similarity),
        through(weight, targets[rank], similarity),
        labels[rank],
        similarity=similarity,
        num_classes=CLASSES,
        target_labels=labels_of(len(targets[rank]), rank),
        group=node if scope == "node" else None,
        communication=communication,
        detach_statistics=detach,
        implementation=implementation,
        **own,
        **switches,
    )
    found.loss.backward()
    assert weight.grad is not None
    loss = found.loss.detach().clone()
    for value in (loss, weight.grad):
        dist.all_reduce(value)
    return {
        "loss": loss / ranks,
        "gradient": weight.grad / ranks,
        "numbers": numbers(found),
        "sent": int(found.communication_bytes),
    }


def one_process(ranks: int, case: Case) -> dict[str, torch.Tensor]:
    similarity, scope, _, _, detach, _ = case
    sources, targets, labels = pixels(similarity, ranks)
    candidates = {"world": [list(range(ranks))], "rank": [[rank] for rank in range(ranks)], "node": nodes(ranks)}[scope]
    weight = torch.eye(CHANNELS, dtype=torch.float64, requires_grad=True)
    truth = [labels_of(len(target), rank) for rank, target in enumerate(targets)]

    def joined(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([parts[rank] for rank in ranks_of]) for ranks_of in candidates]

    drawn = [refined(case, rank)[0] for rank in range(ranks)]
    options: dict[str, Any] = {
        name: joined([own[name] for own in drawn]) for name in drawn[0] if name != "guide"
    } | refined(case, 0)[1]
    if "guide" in drawn[0]:
        options["guide"] = tuple(joined([own["guide"][side] for own in drawn]) for side in (0, 1))
    found = cycle_association_pairs(
        [through(weight, rows, similarity) for rows in joined(sources)],
        [through(weight, rows, similarity) for rows in joined(targets)],
        joined(labels),
        similarity=similarity,
        num_classes=CLASSES,
        target_labels=joined(truth),
        detach_statistics=detach,
        implementation="reference",
        **options,
    )
    found.loss.backward()
    assert weight.grad is not None
    return {"loss": found.loss.detach(), "gradient": weight.grad, "numbers": numbers(found)}


@pytest.mark.parametrize("ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process_in_every_scope_and_exchange(tmp_path: Path, ranks: int) -> None:
    for found in run_on_ranks(all_cases, ranks, tmp_path):
        for case, result in zip(CASES, found, strict=True):
            expected = one_process(ranks, case)
            for name, value in expected.items():
                torch.testing.assert_close(
                    result[name], value, rtol=1e-9, atol=1e-11, equal_nan=True, msg=partial("{}: {}".format, case)
                )
            alone = ranks == 1 or case[1] == "rank"
            assert (result["sent"] == 0) == alone


def pairs(similarity: Similarity, images: Sequence[int], refinement: str) -> dict[str, Any]:
    """Arguments of `cycle_association_pairs` but the images' pixels: one image of each domain for each of `SIZES`."""
    chosen = [refined((similarity, "pair", "local", "auto", True, refinement), image) for image in images]
    drawn, switches = [inputs for inputs, _ in chosen], chosen[0][1]
    arguments: dict[str, Any] = {name: [one[name] for one in drawn] for name in drawn[0]} | switches
    if "guide" in arguments:
        arguments["guide"] = tuple(zip(*arguments["guide"], strict=True))
    return arguments | {
        "labels": [labels_of(SIZES[image][0], image) for image in images],
        "target_labels": [labels_of(SIZES[image][1], image) for image in images],
    }


def associated_pairs(images: Sequence[int], case: Case) -> dict[str, torch.Tensor]:
    similarity, _, _, implementation, detach, refinement = case
    sources, targets, _ = pixels(similarity, len(SIZES))
    weight = torch.eye(CHANNELS, dtype=torch.float64, requires_grad=True)
    found = cycle_association_pairs(
        [through(weight, sources[image], similarity) for image in images],
        [through(weight, targets[image], similarity) for image in images],
        similarity=similarity,
        num_classes=CLASSES,
        detach_statistics=detach,
        implementation=implementation,
        **pairs(similarity, images, refinement),
    )
    found.loss.backward()
    assert weight.grad is not None
    return {"loss": found.loss.detach(), "gradient": weight.grad, "numbers": numbers(found)}


def all_pair_cases(rank: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    own = range(rank * len(SIZES) // ranks, (rank + 1) * len(SIZES) // ranks)
    results = [associated_pairs(own, case) for case in PAIR_CASES]
    for result in results:
        for name in ("loss", "gradient"):
            dist.all_reduce(result[name])
            result[name] /= ranks
    return results


def test_pairs_of_images_on_two_ranks_equal_those_of_one_process_with_every_refinement(tmp_path: Path) -> None:
    expected = [associated_pairs(range(len(SIZES)), case) for case in PAIR_CASES]
    # A sum over no kept cycle would be equal too.
    assert all(float(result["loss"]) > 0 for result in expected)
    for found in run_on_ranks(all_pair_cases, 2, tmp_path):
        for case, result, one in zip(PAIR_CASES, found, expected, strict=True):
            for name, value in one.items():
                torch.testing.assert_close(
                    result[name], value, rtol=1e-9, atol=1e-11, equal_nan=True, msg=partial("{}: {}".format, case)
                )


def in_several_types(rank: int, ranks: int) -> dict[str, Any]:
    sources, targets, labels = pixels("cosine", ranks)
    results: dict[str, Any] = {}
    for communication, dtype, comm_dtype in product(COMMUNICATIONS, PRECISIONS, PRECISIONS):
        source = sources[rank].float().requires_grad_()
        found = cycle_association(
            source,
            targets[rank].float(),
            labels[rank],
            num_classes=CLASSES,
            communication=communication,
            dtype=dtype,
            comm_dtype=comm_dtype,
        )
        found.loss.backward()
        loss = found.loss.detach().clone()
        dist.all_reduce(loss)
        sent = int(found.communication_bytes)
        results[f"{communication} {dtype} {comm_dtype}"] = {"loss": loss / ranks, "grad": source.grad, "sent": sent}
    return results


def test_matmul_and_comm_dtypes_of_either_kind_find_the_same_loss(tmp_path: Path) -> None:
    sources, targets, labels = pixels("cosine", 3)
    expected = cycle_association(
        torch.cat(sources), torch.cat(targets), torch.cat(labels), num_classes=CLASSES, implementation="reference"
    ).loss.float()
    found = run_on_ranks(in_several_types, 3, tmp_path)[0]
    for name, result in found.items():
        tolerance = 2e-2 if "bf16" in name else 1e-5
        torch.testing.assert_close(result["loss"], expected, rtol=tolerance, atol=0, check_dtype=False, msg=name)
        assert result["grad"].isfinite().all()
    for communication in COMMUNICATIONS:
        assert found[f"{communication} fp32 bf16"]["sent"] < found[f"{communication} fp32 fp32"]["sent"]


def repeated(rank: int, ranks: int) -> list[torch.Tensor | None]:
    sources, targets, labels = pixels("cosine", ranks)
    gradients = []
    for _ in range(3):
        source = sources[rank].float().requires_grad_()
        cycle_association(
            source, targets[rank].float(), labels[rank], num_classes=CLASSES, communication="ring"
        ).loss.backward()
        gradients.append(source.grad)
    return gradients


def test_the_ring_adds_in_the_same_order_every_time(tmp_path: Path) -> None:
    for first, *others in run_on_ranks(repeated, 3, tmp_path):
        assert all(torch.equal(first, other) for other in others)


def without_a_kept_cycle(rank: int, ranks: int) -> list[torch.Tensor]:
    sources, targets, labels = pixels("cosine", ranks)
    results = []
    for weight, seen, communication in product((0.0, 1.0), (255, None), COMMUNICATIONS):
        source, target = sources[rank].clone().requires_grad_(), targets[rank].clone().requires_grad_()
        found = cycle_association(
            source,
            target,
            labels[rank],
            num_classes=CLASSES,
            target_weights=torch.full((len(target),), weight),
            target_classes=None if seen is None else torch.full((len(target),), seen),
            class_balanced=True,
            guide=(source.roll(1, dims=1), target),
            communication=communication,
        )
        found.loss.backward()
        assert source.grad is not None
        assert target.grad is not None
        results.append(torch.stack([found.loss.detach(), source.grad.abs().sum(), target.grad.abs().sum()]))
    return results


def test_a_world_without_a_weighted_cycle_has_a_zero_with_a_graph_on_every_rank(tmp_path: Path) -> None:
    for found in run_on_ranks(without_a_kept_cycle, 2, tmp_path):
        *nothing, gather, ring = found
        assert not any(values.any() for values in nothing)
        torch.testing.assert_close(gather, ring)
    # The last two cases do keep cycles, of rank 0's source pixels and both ranks' target pixels.
    assert all(values.isfinite().all() for values in (gather, ring))
