"""What typed YAML files are made of: groups of keys that refuse keys they do not know, and types of values."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of keys that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", value)
    if parts is None:
        raise ValueError(f"write seconds or [D-]HH:MM:SS, got {value!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]
"""Seconds. YAML reads an unquoted 10:00:00 as 36000, the seconds it has, so a bare number can mean nothing else."""
