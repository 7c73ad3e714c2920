"""Values that no reader of a file expects, put anywhere into what it reads."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from dist_pca.errors import UserError

NASTY: st.SearchStrategy[object] = st.sampled_from(
    [
        *(None, True, -1, 0, 2**63, 2**64, 10**400, -(2**70), 1.5, float("nan"), float("inf")),
        *("", "x" * 5000, "../../etc/passwd", "/absolute", "a\nb", "1:2:3", "${oc.env:HOME}", "${a.b}", "???"),
        *([], {}, [[]], [0] * 10, {"a": 1}),
    ]
)

STEPS = st.lists(st.integers(0, 40), max_size=5)
"""Steps into a file for `replaced`."""
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(3000))


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """Give a test its number of `examples`: few, and many among the exhaustive tests."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=EXHAUSTIVE)], ids=["few", "many"])


def check_one_line(read: Callable[[], object], longest: int) -> None:
    """Check that reading succeeds, or is refused in one line of less than `longest` characters."""
    message = ""
    try:
        read()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < longest


def replaced(value: Any, steps: list[int], new: object) -> Any:
    """Replace what lies some steps into nested lists and dictionaries; None as `new` leaves it out."""
    if not steps or not isinstance(value, dict | list) or not value:
        return new
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    place, rest = steps[0] % len(items), steps[1:]
    inner = replaced(items[place][1], rest, new)
    items[place : place + 1] = [] if inner is None else [(items[place][0], inner)]
    return dict(items) if isinstance(value, dict) else [item for _, item in items]
