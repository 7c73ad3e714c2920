"""The run configs, shard recipes and launcher files that travel with the package.

In a checkout they are the top-level folders `configs/`, `shards/` and `launch/`; a wheel carries copies in here.
"""

import difflib
from pathlib import Path
from typing import Literal

from dist_pca.errors import UserError

Kind = Literal["configs", "shards", "launch"]


def resource(kind: Kind, name: str) -> Path:
    """Path of a shipped YAML file, by its path inside the folder `kind`, with or without `.yaml`.

    Raises:
        UserError: there is no such file; the nearest name is given.
    """
    path = _folder(kind) / f"{name.removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(name, names(kind), n=1, cutoff=0.0)[0]
    raise UserError(
        f"{kind}/{name}: no such file comes with dist-pca; the nearest is {nearest}, all are {', '.join(names(kind))}"
    )


def names(kind: Kind) -> list[str]:
    """Names of the shipped files of one kind, without `.yaml`, sorted."""
    folder = _folder(kind)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _folder(kind: Kind) -> Path:
    installed = Path(__file__).parent / kind
    return installed if installed.is_dir() else Path(__file__).parents[2] / kind
