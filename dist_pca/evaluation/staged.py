"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from dist_pca.errors import UserError


@contextmanager
def staged_folder(out: Path, option: str) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` at the end and is removed if anything fails.

    A collective call where torch.distributed is initialised: ranks, which must share the file system, write into one
    folder.

    Args:
        out: The folder to make; if there is one, it must be empty.
        option: Where the user named it, for messages.

    Raises:
        UserError: there is something in `out`, or it cannot be written.
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
        # A rank that fails takes the folder from the others too, which its launcher ends.
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{option} {out}: cannot be written ({error}); give another folder") from error
        raise


def refuse_what_is_there(out: Path, option: str) -> None:
    """Make sure that there is no file in the place of a folder, and nothing in the folder.

    Raises:
        UserError: there is.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{option} {out}: is there already; remove it or give another folder")


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
