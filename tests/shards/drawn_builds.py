"""Builds of data sets whose labels are shapes: the labels in their shards, and refusals of what was edited."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.recipe import Recipe
from tests.support.drawn_data import write_json
from tests.support.shards import label_of, stored_samples

Edit = Callable[[dict[str, Any]], Any]


def built(recipe: Recipe | str, root: Path, **options: Any) -> list[npt.NDArray[np.uint8]]:
    out = root.parent / f"out-{len([*root.parent.iterdir()])}"
    manifest = build_shards(recipe, root, out, workers=1, **options)
    return [np.array(label_of(sample), np.uint8) for sample in stored_samples(manifest)]


def edited(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    write_json(path, content)


def refusal(recipe: Recipe, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        build_shards(recipe, root, root.parent / "out", workers=1)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    return str(caught.value)


def first(key: str, **values: Any) -> Edit:
    """An edit of the first entry of a list."""
    return lambda content: content[key][0].update(values)
