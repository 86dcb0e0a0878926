"""Paths and fsspec URLs (``s3://bucket/x``) alike: what writes or reads a local folder, used on either."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from dvpo_service.errors import UserError

StoragePath = Path | UPath  # a UPath of a plain path is a Path


def storage_path(path: str | StoragePath) -> StoragePath:
    """A URL as a UPath, anything else as an absolute Path. Raises UserError where its file system is not installed."""
    if not is_url(path):
        return Path(str(path)).absolute()
    try:
        return UPath(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {error}; for s3:// install the extra: pip install 'dvpo-service[s3]'") from error


def is_url(path: str | StoragePath) -> bool:
    return "://" in str(path)


def make_folder(place: StoragePath) -> None:
    """Where there are folders: object stores have none, and s3fs would make a bucket out of a slip of the pen."""
    if isinstance(place, Path) or place.protocol == "file":
        place.mkdir(parents=True, exist_ok=True)


def files_below(folder: StoragePath) -> list[str]:
    """Paths of all files below ``folder``, relative to it; none where there is no such folder."""
    if isinstance(folder, Path):
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    folder.fs.invalidate_cache()
    return sorted(str(found)[len(folder.path.rstrip("/")) + 1 :] for found in folder.fs.find(folder.path))


@contextmanager
def written_locally(folder: str) -> Iterator[str]:
    """A local folder to write to, whose content is in ``folder`` when the block ends."""
    if not is_url(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dvpo-out-") as local:
        yield local
        target = UPath(folder)
        for file in Path(local).rglob("*"):
            if file.is_file():
                target.fs.put_file(str(file), (target / str(file.relative_to(local))).path)


@contextmanager
def read_locally(folder: str) -> Iterator[str]:
    """A local folder with the files of ``folder``, for as long as the block runs."""
    if not is_url(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dvpo-in-") as local:
        source = UPath(folder)
        source.fs.invalidate_cache()
        for file in source.iterdir():
            source.fs.get_file(file.path, f"{local}/{file.name}")
        yield local
