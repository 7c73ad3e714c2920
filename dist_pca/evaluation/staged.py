"""Folders that are written atomically."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from dist_pca.errors import UserError


@contextmanager
def staged_folder(out: Path, option: str) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, which is renamed to `out` at the end, or removed if anything fails.

    Collective if torch.distributed is initialised: ranks, which must share the file system, write into one folder.

    Args:
        out: The folder to create; if it exists, it must be empty.
        option: Command-line option of the folder, for messages.

    Raises:
        UserError: `out` is not empty, or cannot be written.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    aside = out.absolute().with_name(f".{out.absolute().name}.partial")
    if first:
        refuse_what_is_there(out, option)
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        _wait_for_all()
        yield aside
        _wait_for_all()
        if first:
            if out.exists():
                out.rmdir()
            aside.rename(out)
        _wait_for_all()
    except BaseException as error:
        # A rank that fails removes the folder for all ranks; the launcher ends the others.
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{option} {out}: cannot be written ({error}); give another folder") from error
        raise


def refuse_what_is_there(out: Path, option: str) -> None:
    """Check that a folder does not exist or is empty.

    Raises:
        UserError: it is a file, or is not empty.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{option} {out}: exists already; remove it or give another folder")


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
