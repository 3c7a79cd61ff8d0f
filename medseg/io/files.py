"""Writing without half files: a temporary name beside the target, then one rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_folder", "atomic_path", "require_free"]


def require_free(path: str | os.PathLike[str], force: bool = False) -> Path:
    """The path, if nothing would be overwritten.

    Raises
    ------
    FileExistsError
        If the path exists and ``force`` is not set.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"output must not exist yet, got {path}; choose another name or use --force")
    return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; rename it when the block ends well, remove it otherwise.

    The temporary name ends like the target (".nii.gz" stays ".nii.gz"), so that writers that look at the suffix work.
    Parent folders are made. A full disk, Ctrl-C or a crash therefore never leaves half a file under the final name.

    Raises
    ------
    FileExistsError
        If the path exists and ``force`` is not set.
    """
    path = require_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".medseg-", suffix=f"-{path.name[-80:]}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files; outputs get the user's usual rights
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """As :func:`atomic_path` for a folder; with ``force`` an existing folder is replaced as a whole."""
    path = require_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".medseg-", dir=path.parent))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
