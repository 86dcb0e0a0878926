"""Local paths and fsspec URLs (``s3://bucket/x``) under one interface."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dvpo_service.errors import UserError

if TYPE_CHECKING:  # what never sees a URL (scripts/gpu_check.py) does without the package
    from upath import UPath

StoragePath: TypeAlias = "Path | UPath"  # UPath("/plain/path") is a Path


def storage_path(path: str | StoragePath) -> StoragePath:
    """Return a URL as a UPath, anything else as an absolute Path, with ``~`` for the home directory.

    Raises:
      UserError: the package for the URL's file system is not installed.
    """
    if not is_url(path):
        return Path(os.path.expanduser(str(path))).absolute()
    from upath import UPath

    try:
        return UPath(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {error}; for s3:// install the extra: pip install 'dvpo-service[s3]'") from error


def is_url(path: str | StoragePath) -> bool:
    """Return whether ``path`` has a scheme, such as ``s3://`` or ``file://``."""
    return "://" in str(path)


def make_folder(place: StoragePath) -> None:
    """Make a folder, where there are folders. Object stores have none, and s3fs would create a bucket from a typo."""
    if isinstance(place, Path) or place.protocol == "file":
        place.mkdir(parents=True, exist_ok=True)


def files_below(folder: StoragePath) -> list[str]:
    """Return the paths of all files below ``folder``, relative to it and sorted; none if there is no such folder."""
    if isinstance(folder, Path):
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    folder.fs.invalidate_cache()
    return sorted(str(path)[len(folder.path.rstrip("/")) + 1 :] for path in folder.fs.find(folder.path))


def follow_umask(folder: Path) -> None:
    """Give every file below ``folder`` the mode that the umask asks for. Some libraries write weights with 0600.

    ``folder`` itself was made by ``mkdir``, so its mode has the umask.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def remove_marked(folder: UPath, marker: str) -> None:
    """Remove a folder at a URL: first the file that marks it as complete, so that no reader takes half of it."""
    folder.fs.invalidate_cache()
    (folder / marker).unlink(missing_ok=True)
    folder.fs.invalidate_cache()
    if folder.exists():
        folder.fs.rm(folder.path, recursive=True)


@contextmanager
def written_locally(folder: str, *, last: str | None = None) -> Iterator[str]:
    """Yield a local folder to write to; its files are in ``folder`` (a path or URL) when the block ends.

    Args:
      last: the file that is copied to a URL after all others, as the mark of a complete folder.
    """
    if not is_url(folder):
        yield folder
        return
    from upath import UPath

    with tempfile.TemporaryDirectory(prefix="dvpo-out-") as local:
        yield local
        target = UPath(folder)
        for file in sorted(Path(local).rglob("*"), key=lambda file: file.name == last):
            if file.is_file():
                target.fs.put_file(str(file), (target / str(file.relative_to(local))).path)


@contextmanager
def read_locally(folder: str) -> Iterator[str]:
    """Yield a local folder with the files of ``folder`` (a path or URL), for the duration of the block."""
    if not is_url(folder):
        yield folder
        return
    from upath import UPath

    with tempfile.TemporaryDirectory(prefix="dvpo-in-") as local:
        source = UPath(folder)
        source.fs.invalidate_cache()
        for file in source.iterdir():
            source.fs.get_file(file.path, f"{local}/{file.name}")
        yield local
