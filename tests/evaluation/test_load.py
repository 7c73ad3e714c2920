"""A run folder is loaded, or refused in one line, whatever its files hold."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_pca.errors import UserError
from dist_pca.evaluation.load import load_run
from tests.support.networks import CLASSES, segmenter, write_run

TABLE: list[dict[str, Any]] = [asdict(info) for info in CLASSES]


@pytest.mark.parametrize(
    "table",
    [
        *([], {}, "x", 1, None, ["road", "sky", "car"], [{"name": "road"}], TABLE[:1], [*TABLE, TABLE[0]]),
        [{**info, "color": [256, 0, 0]} for info in TABLE],
        [{**info, "color": "red"} for info in TABLE],
        [TABLE[0]] * 3,
        [{"name": str(index), "color": [0, 0, 0]} for index in range(300)],
    ],
)
def test_a_class_table_that_is_none_or_another_is_refused_in_one_line(tmp_path: Path, table: object) -> None:
    run = write_run(tmp_path, segmenter())
    (run / "classes.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"\A{run}/[^\n]+\Z"):
        load_run(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.to(torch.int64),
        lambda value: value.to(torch.complex64),
        lambda value: value.bool(),
        lambda value: value.flatten()[:0],
        lambda value: value[None],
    ],
    ids=["integers", "complex", "booleans", "empty", "nested"],
)
def test_tensors_of_another_kind_or_shape_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    run = write_run(tmp_path, segmenter())
    file = run / "checkpoints" / "step-00000001" / "model.safetensors"
    save_file({name: change(value).contiguous() for name, value in segmenter().state_dict().items()}, file)
    with pytest.raises(UserError, match=rf"\A{run}/checkpoints/step-00000001: belongs to another network [^\n]+\Z"):
        load_run(run)


def test_weights_in_half_precision_are_loaded(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmenter())
    state = segmenter().state_dict()
    halved = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(halved, run / "checkpoints" / "step-00000001" / "model.safetensors")
    model = load_run(run)[2]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-3)
