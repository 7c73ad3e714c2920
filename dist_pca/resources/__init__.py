"""Run configs, shard recipes, launcher files and batch scripts that ship with the package.

In a checkout they are in the top-level folders `configs/`, `shards/` and `launch/`; a wheel has copies in this folder.
"""

from pathlib import Path
from typing import Literal

from dist_pca.errors import UserError, nearest

Kind = Literal["configs", "shards", "launch"]
Suffix = Literal[".yaml", ".sbatch"]


def resource(kind: Kind, name: str, suffix: Suffix = ".yaml") -> Path:
    """Find a shipped file by its path inside the folder `kind`, with or without its extension.

    Raises:
        UserError: there is no such file; the message names the nearest one.
    """
    path = _folder(kind) / f"{name.removesuffix(suffix)}{suffix}"
    if path.is_file():
        return path
    shipped = names(kind, suffix)
    raise UserError(
        f"{kind}/{name}: no such file comes with dist-pca; the nearest is {nearest(name, shipped)}, "
        f"all are {', '.join(shipped)}"
    )


def names(kind: Kind, suffix: Suffix = ".yaml") -> list[str]:
    """List the names of the shipped files of one kind, sorted and without extension."""
    folder = _folder(kind)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{suffix}"))


def _folder(kind: Kind) -> Path:
    installed = Path(__file__).parent / kind
    return installed if installed.is_dir() else Path(__file__).parents[2] / kind
