"""What pydantic finds wrong is said in the words of the field, once for each key."""

import pytest

from dist_pca.config import load_config
from dist_pca.errors import UserError
from dist_pca.resources import resource


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=", "data.source: expected text or a list, got nothing"),
        ("data.source=[{shards: a, share: 2}]", "data.source.0.share: unknown key; the nearest is"),
        ("data.crop=64", "data.crop: expected a list, got 64"),
        ("data.crop=[64,wide]", "data.crop.1: expected a whole number, got 'wide'"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
        ("model.joint_batch=maybe", "model.joint_batch: expected true or false, got 'maybe'"),
        ("objective=3", "objective: expected a table of keys and values, got 3"),
        ("training.steps=-1", "training.steps: Input should be greater than"),
    ],
)
def test_a_value_of_another_kind_is_said_once_and_in_plain_words(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(resource("configs", "demo"), [override])
    found = str(refused.value).partition(".yaml: ")[2]
    assert found.startswith(message)
    assert ";" not in found.removeprefix(message)
