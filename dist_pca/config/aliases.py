"""Old names of config keys and metric fields, which still work in this version. This is the one table of them.

Config files, overrides and studies are renamed as they are read, so everything behind `load_config` has the new names.
A log or saved state of metrics is renamed by `rename_metrics`.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from dist_pca.errors import UserError

_log = logging.getLogger("dist_pca.config")
REMOVED_IN = "0.3"
"""Version in which the old names stop working."""


class KeyAlias(NamedTuple):
    """An old config key."""

    old: str
    """With dots; in the same section as `new`."""
    new: str
    values: Mapping[str, Any] = {}
    """New value by old value, where values have other names too."""


KEY_ALIASES = (
    KeyAlias("objective.association.exchange", "objective.association.communication"),
    KeyAlias("objective.association.wire_dtype", "objective.association.comm_dtype"),
    KeyAlias("objective.association.position_budget", "objective.association.pixel_budget"),
    KeyAlias("objective.association.position_sampling", "objective.association.pixel_sampling"),
    KeyAlias("training.accumulation_pool", "training.grad_cache", {"micro_batch": False, "update": True}),
    KeyAlias("training.max_bad_steps", "training.max_non_finite_steps"),
)
METRIC_ALIASES = {
    **{f"nats_over_chance_{level}": f"mutual_information_bound_{level}" for level in ("features", "predictions")},
    **{f"exchanged_bytes_{level}": f"communication_bytes_{level}" for level in ("features", "predictions")},
}
"""New field by old field of a line of metrics."""
PHASE_ALIASES = {"exchange": "communication"}
"""New name by old name of a step's phase."""
RESULT_ALIASES = {"exchange": "communication", "exchanged_bytes": "communication_bytes"}
"""New column by old column of a CSV of `dist-pca bench association`."""

_warned: set[str] = set()


def rename_keys(values: Any, origin: str) -> Any:
    """Return nested dictionaries of config keys with new names in place of old ones, and log a warning for each.

    Args:
        values: What a config file or overrides hold; anything but a dictionary is returned as it is.
        origin: Where they were read, with which messages begin.

    Raises:
        UserError: a key is there under both names.
    """
    for alias in KEY_ALIASES:
        values = _renamed(values, alias, alias.old.split(".")[:-1], origin)
    return values


def rename_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line or a window of metrics with new names in place of old ones."""
    renamed = {METRIC_ALIASES.get(name, name): value for name, value in record.items()}
    if isinstance(seconds := renamed.get("seconds"), dict):
        renamed["seconds"] = {PHASE_ALIASES.get(phase, phase): value for phase, value in seconds.items()}
    return renamed


def warn_renamed(old: str, new: str, origin: str) -> None:
    """Log that a name is old; once per process for each name, and on rank 0 alone."""
    if old not in _warned and os.environ.get("RANK", "0") == "0":
        _warned.add(old)
        _log.warning("%s: %s is now %s; the old name works until version %s", origin, old, new, REMOVED_IN)


def _renamed(values: Any, alias: KeyAlias, sections: list[str], origin: str) -> Any:
    if not isinstance(values, dict):
        return values
    if sections:
        section, *inner = sections
        if section not in values:
            return values
        return {**values, section: _renamed(values[section], alias, inner, origin)}
    old, new = (key.rpartition(".")[2] for key in (alias.old, alias.new))
    if old not in values:
        return values
    if new in values:
        raise UserError(
            f"{origin}: {alias.old} is the old name of {alias.new}, and both are given; leave out {alias.old}"
        )
    value = values[old]
    changed = alias.values.get(value, value) if isinstance(value, str) else value
    if alias.values:
        warn_renamed(f"{alias.old}={value}", f"{alias.new}={str(changed).lower()}", origin)
    else:
        warn_renamed(alias.old, alias.new, origin)
    return {new if key == old else key: changed if key == old else each for key, each in values.items()}
