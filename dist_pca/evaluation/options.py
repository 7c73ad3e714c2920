"""Command-line options that override a run's evaluation keys."""

from typing import Any

from pydantic import ValidationError

from dist_pca.config import EvaluationConfig, RunConfig
from dist_pca.errors import UserError, explain


def parse_class_map(pairs: list[str]) -> dict[str, str]:
    """Parse pairs `SHARDS=RUN` of class names.

    Raises:
        UserError: one has another form, or a class is given twice.
    """
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, separator, other = pair.partition("=")
        if not separator or not name or not other or parsed.get(name, other) != other:
            raise UserError(
                f"--class-map {pair!r}: give each class of the shards once, as SHARDS=RUN: its name, =, and the run's "
                "name of it"
            )
        parsed[name] = other
    return parsed


def with_options(config: RunConfig, **options: Any) -> RunConfig:
    """Override evaluation keys of a run's config by those options that are not None.

    Raises:
        UserError: a value is invalid, or does not fit the others.
    """
    chosen = {key: value for key, value in options.items() if value is not None}
    # The config's stride is meant for the config's window; a new window does not use it.
    own = config.evaluation.model_dump(exclude={"stride"} if "window" in chosen else None)
    try:
        evaluation = EvaluationConfig.model_validate(own | chosen)
    except ValidationError as error:
        reason = explain(error.errors(), EvaluationConfig.model_fields)
        raise UserError(f"evaluation.{reason}; options give {chosen}") from None
    return config.model_copy(update={"evaluation": evaluation})
