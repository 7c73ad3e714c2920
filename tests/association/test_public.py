"""The public names: imported when first used, and one loss behind the function and the module."""

import inspect
import os
import pydoc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import dist_pca
from dist_pca.association import Association, CycleAssociationLoss, associate, associate_pairs, cycle_association
from dist_pca.association.loss import cycle_association_pairs
from dist_pca.association.options import Options
from tests.association.pixels import CLASSES, domain, labels_of, refinements

OTHER_PACKAGES = (
    *("accelerate", "deepspeed", "numpy", "omegaconf", "pydantic", "safetensors", "timm", "torchvision", "webdataset"),
    *("dist_pca.config", "dist_pca.data", "dist_pca.model", "dist_pca.objective"),
    *("dist_pca.shards", "dist_pca.training"),
)


def run(code: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    run("import sys, dist_pca; assert dir(dist_pca); sys.exit('torch' in sys.modules)")


def test_every_public_name_resolves() -> None:
    for name in dist_pca.__all__:
        assert getattr(dist_pca, name) is not None
        assert name in dir(dist_pca)
    assert dist_pca.cycle_association is cycle_association
    assert dist_pca.CycleAssociationLoss is CycleAssociationLoss
    with pytest.raises(AttributeError, match="has no attribute 'cycle'"):
        dist_pca.cycle  # noqa: B018


def test_the_first_names_of_the_functions_are_aliases() -> None:
    assert associate is cycle_association
    assert associate_pairs is cycle_association_pairs


def test_help_lists_every_option_with_its_default() -> None:
    communication = {"communication", "comm_dtype"}
    for function, absent in (
        (cycle_association, set()),
        (CycleAssociationLoss, set()),
        (cycle_association_pairs, communication),
    ):
        shown = inspect.signature(function).parameters
        assert not absent & set(shown)
        for option in fields(Options):
            if option.name not in {"num_classes", *absent}:
                assert shown[option.name].default == option.default, option.name
        assert "similarity: Literal['cosine', 'kl'] = 'cosine'" in pydoc.plain(pydoc.render_doc(function))


@pytest.mark.parametrize(
    "unknown", [{"similarty": "kl"}, {"communication": "ring"}, {"comm_dtype": "fp32"}, {"group": None}]
)
def test_what_is_no_option_of_pairs_is_refused(unknown: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(unknown))):
        cycle_association_pairs([torch.ones(3, 4)], [torch.ones(3, 4)], [torch.zeros(3)], num_classes=2, **unknown)


def test_types_are_part_of_the_package() -> None:
    assert (Path(dist_pca.__file__).parent / "py.typed").is_file()


def test_the_association_needs_torch_alone() -> None:
    run(
        f"import sys\nfor name in {OTHER_PACKAGES}: sys.modules[name] = None\n"
        "import torch\nfrom dist_pca.association import CycleAssociationLoss\n"
        "criterion = CycleAssociationLoss(num_classes=2, similarity='kl')\n"
        "source, target = (torch.rand(9, 4, requires_grad=True).softmax(1) for _ in range(2))\n"
        "criterion(source, target, torch.zeros(9, dtype=torch.int64)).loss.backward()"
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"similarity": "kl", "detach_statistics": False, "dtype": "bf16"},
        {"class_balanced": True, "guide_keys": True, "implementation": "reference", "deterministic": True},
        {"communication": "local", "comm_dtype": "bf16", "implementation": "online_softmax"},
        {"class_balanced": True, "class_weights": "kept_share"},
    ],
)
def test_the_module_is_the_function_bit_for_bit(options: dict[str, Any]) -> None:
    similarity, guided = options.get("similarity", "cosine"), options.get("guide_keys", False)
    inputs = refinements(30, 20, 6, similarity, 2, classes=True, weights=True, guide=guided)
    inputs["target_labels"] = labels_of(20, 9)
    criterion = CycleAssociationLoss(CLASSES, **options)
    results = []
    function = partial(cycle_association, num_classes=CLASSES, **options)
    forms: tuple[Callable[..., Association], ...] = (criterion, function)
    for compute in forms:
        source, target = (domain(n, 6, similarity, n).float().requires_grad_() for n in (30, 20))
        found = compute(source, target, labels_of(30, 0), **inputs)
        found.loss.backward()
        results.append([*vars(found).values(), source.grad, target.grad])
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))
    assert not list(criterion.parameters())
    assert f"num_classes={CLASSES}" in repr(criterion)


def test_old_names_of_options_and_results_work_for_one_version() -> None:
    pixels, old = (
        (domain(30, 6, "cosine", 0), domain(20, 6, "cosine", 1), labels_of(30, 0)),
        cast("Any", cycle_association),
    )
    found = cycle_association(*pixels, num_classes=CLASSES, communication="local", comm_dtype="bf16")
    with pytest.warns(DeprecationWarning, match=" is now ") as warned:
        same = old(*pixels, num_classes=CLASSES, exchange="local", wire_dtype="bf16")
    assert [str(warning.message).partition(";")[0] for warning in warned] == [
        *("exchange is now communication", "wire_dtype is now comm_dtype")
    ]
    assert torch.equal(same.loss, found.loss)
    assert same.nats_over_chance is same.mutual_information_bound
    assert same.exchanged_bytes is same.communication_bytes
