"""Building blocks of typed YAML files: a base class that refuses unknown keys, and value types."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of keys that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", value)
    if parts is None:
        raise ValueError(f"write seconds or [D-]HH:MM:SS, got {value[:80]!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
"""Duration in seconds. YAML parses an unquoted 10:00:00 as 36000 already, so a plain number always means seconds."""
