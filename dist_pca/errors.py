"""Errors whose message is meant for the user, and what messages are made of."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST = 80
"""Characters of a key or value that a message repeats."""
_EXPECTED = {
    **dict.fromkeys(("string_type", "string_sub_type"), "text"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a table of keys and values"),
}
"""What a value should have been, by pydantic's name of the error."""
_PLAIN_TYPES = ("str", "int", "float", "bool")


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


def explain(details: Iterable[Mapping[str, Any]], known: Iterable[str]) -> str:
    """Say in one line what pydantic found wrong with values, each after its key.

    Args:
        details: Some of `ValidationError.errors()`.
        known: All keys, written with dots, among which the nearest to an unknown one is named.
    """
    keys = list(known)
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for detail in details:
        key = ".".join(str(part) for part in detail["loc"] if not _is_type(str(part)))[:_LONGEST]
        by_key.setdefault(key, []).append(detail)
    # Of a key that may be of several types, what is wrong inside the value says more than that it is of another type.
    outer = {key[: dot.start()] for key in by_key for dot in re.finditer(r"\.", key)}
    return "; ".join(_explain(key, found, keys) for key, found in by_key.items() if key not in outer)


def _is_type(part: str) -> bool:
    """Whether part of an error's place is a type, of several that the key may have, and no key."""
    return part in _PLAIN_TYPES or part.endswith("]")


def _explain(key: str, details: list[Mapping[str, Any]], known: list[str]) -> str:
    """What is wrong with one key, in whose place each type that it may have gives a detail."""
    detail = details[0]
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; the nearest is {nearest(key, known)}"
    if detail["type"] == "missing":
        return f"{key}: required and missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if all(found["type"] in _EXPECTED for found in details):
        message = "expected " + " or ".join(dict.fromkeys(_EXPECTED[found["type"]] for found in details))
    if detail["type"] != "value_error":
        message = f"{message}, got {_shortened(detail['input'])}"
    elif key and re.match(r"[a-z_.]+: ", message):  # a section's own validator names the key inside the section
        return f"{key}.{message}"
    return f"{key}: {message}" if key else message


def _shortened(value: object) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
