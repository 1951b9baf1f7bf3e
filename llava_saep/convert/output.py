"""A folder or file that is there completely or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_saep.errors import UserError
from llava_saep.file_modes import share_like_folder


def refuse_existing(path: Path) -> None:
    """Raise a UserError when something is there already; nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already and is not overwritten; name another output, or remove it first")


@contextmanager
def written_at_once(path: str | Path, *, is_folder: bool = True) -> Iterator[Path]:
    """Give a place beside `path` to write to, and move it there when the block has ended well.

    Raises:
        UserError: there is something at `path` already, or its place cannot be written to.
    """
    path = Path(path)
    refuse_existing(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_folder:
            partial.mkdir()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    try:
        yield partial
        refuse_existing(path)
        share_like_folder(partial)
        partial.rename(path)
    finally:
        if is_folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
