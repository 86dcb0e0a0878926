"""What a checkpoint's files were when they were written, so that a damaged one is never loaded.

torch reads around a missing shard in silence, and takes a flipped bit for a weight. So whoever writes a
file sums it up, the sums stand in ``state.json``, and whoever reads a checkpoint compares first.
"""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple

from dvpo_service.errors import CheckpointError
from dvpo_service.runs.storage import StoragePath, files_below

STATE_FILE = "state.json"
_CHUNK = 2**22
_READERS = 8


class FileSum(NamedTuple):
    """``size`` in bytes. CRC-32 finds every flipped bit and burst; it is no defence against an enemy."""

    size: int
    crc32: int

    def add(self, data: bytes) -> FileSum:
        return FileSum(self.size + len(data), zlib.crc32(data, self.crc32))


NOTHING = FileSum(0, 0)
Files = dict[str, FileSum]  # by path below the folder


class Damaged(CheckpointError):
    """Files of a checkpoint are not what was written."""


@dataclass(frozen=True)
class Written:
    """A ``SaveJob`` that has ended."""

    files: Files

    def done(self) -> bool:
        return True

    def result(self, timeout_s: float | None = None) -> Files:
        return self.files


def sum_of(stream: IO[bytes]) -> FileSum:
    found = NOTHING
    while data := stream.read(_CHUNK):
        found = found.add(data)
    return found


def sums_of(folder: StoragePath) -> Files:
    """Of every file below ``folder``."""
    return {name: _sum_file(folder, name) for name in files_below(folder)}


def write_record(folder: StoragePath, record: Mapping[str, Any], files: Files) -> None:
    """``state.json``: what the loop remembers, what every file is, and a checksum of both."""
    tree = {**record, "files": files}
    (folder / STATE_FILE).write_text(json.dumps({**tree, "crc32": _crc_of(tree)}))


def read_record(folder: StoragePath) -> tuple[dict[str, Any], Files]:
    """What ``write_record`` was given. Raises Damaged when ``state.json`` is not what it wrote."""
    try:
        tree = json.loads((folder / STATE_FILE).read_bytes())
    except FileNotFoundError as error:
        raise Damaged(f"{STATE_FILE} is missing") from error
    except ValueError as error:
        raise Damaged(f"{STATE_FILE} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("files"), dict):
        raise Damaged(f"{STATE_FILE} has no checksums: it is damaged, or of an older version of this service")
    if tree.pop("crc32", None) != _crc_of(tree):
        raise Damaged(f"{STATE_FILE} differs from what was written")
    return tree, {name: FileSum(*found) for name, found in tree.pop("files").items()}


def verify(folder: StoragePath) -> dict[str, Any]:
    """The record of a checkpoint whose every file is as it was written; reads all of them.

    Raises Damaged when one is not, and CheckpointError when the storage does not answer.
    """
    try:
        record, wanted = read_record(folder)
        found = set(files_below(folder)) - {STATE_FILE}
        for name in sorted(wanted.keys() ^ found):
            raise Damaged(f"{name} is missing" if name in wanted else f"{name} is none of its files")
        with ThreadPoolExecutor(_READERS) as readers:  # the checksum leaves Python's lock to others
            for name, now in zip(wanted, readers.map(partial(_sum_file, folder), wanted), strict=True):
                if now.size != wanted[name].size:
                    raise Damaged(f"{name} has {now.size} bytes instead of {wanted[name].size}")
                if now != wanted[name]:
                    raise Damaged(f"{name} differs from what was written (its checksum is another)")
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
            raise Damaged(f"{error.strerror or error}") from error
        raise CheckpointError(
            f"checkpoint {folder} cannot be read: {error.strerror or error}; the same command tries again"
        ) from error
    return record


def _sum_file(folder: StoragePath, name: str) -> FileSum:
    with (folder / name).open("rb") as stream:
        return sum_of(stream)


def _crc_of(tree: Any) -> int:
    """Of what JSON makes of ``tree``, however it is spaced and ordered."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(tree)), sort_keys=True).encode())
