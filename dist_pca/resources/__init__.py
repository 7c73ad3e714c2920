"""The run configs, shard recipes, launcher files and batch scripts that travel with the package.

In a checkout they are the top-level folders `configs/`, `shards/` and `launch/`; a wheel carries copies in here.
"""

import difflib
from pathlib import Path
from typing import Literal

from dist_pca.errors import UserError

Kind = Literal["configs", "shards", "launch"]
Suffix = Literal[".yaml", ".sbatch"]


def resource(kind: Kind, name: str, suffix: Suffix = ".yaml") -> Path:
    """Path of a shipped file, by its path inside the folder `kind`, with or without its ending.

    Raises:
        UserError: there is no such file; the nearest name is given.
    """
    path = _folder(kind) / f"{name.removesuffix(suffix)}{suffix}"
    if path.is_file():
        return path
    shipped = names(kind, suffix)
    nearest = difflib.get_close_matches(name, shipped, n=1, cutoff=0.0)[0]
    raise UserError(
        f"{kind}/{name}: no such file comes with dist-pca; the nearest is {nearest}, all are {', '.join(shipped)}"
    )


def names(kind: Kind, suffix: Suffix = ".yaml") -> list[str]:
    """Names of the shipped files of one kind, without their ending, sorted."""
    folder = _folder(kind)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{suffix}"))


def _folder(kind: Kind) -> Path:
    installed = Path(__file__).parent / kind
    return installed if installed.is_dir() else Path(__file__).parents[2] / kind
