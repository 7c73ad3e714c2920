"""Errors whose message is meant for the user, and what messages are made of."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST = 80
"""Characters of a key or value that a message repeats."""


class UserError(Exception):
    """An error that the caller can fix: a wrong path, key or value.

    The message is one line: where the error is (file, key), what is wrong, and how to fix it.
    Commands print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


class LostProcess(UserError):
    """A process of the run has died or does not respond; the run can be started again."""

    EXIT_CODE = 69


class CorruptSample(UserError):
    """One unusable sample in an otherwise usable shard; the message names the shard and the sample's key."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is spelled most like `name`, for a message that suggests it."""
    return difflib.get_close_matches(name[:_LONGEST], sorted(known), n=1, cutoff=0.0)[0]


def explain(detail: Mapping[str, Any], known: Iterable[str]) -> str:
    """Say in one line, beginning with the key, what pydantic found wrong with a value.

    Args:
        detail: One of `ValidationError.errors()`.
        known: All keys, written with dots, among which the nearest to an unknown one is named.
    """
    key = ".".join(str(part) for part in detail["loc"])[:_LONGEST]
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; the nearest is {nearest(key, known)}"
    if detail["type"] == "missing":
        return f"{key}: required and missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] != "value_error":
        message = f"{message}, got {_shortened(detail['input'])}"
    elif key and re.match(r"[a-z_.]+: ", message):  # a section's own validator names the key inside the section
        return f"{key}.{message}"
    return f"{key}: {message}" if key else message


def _shortened(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
