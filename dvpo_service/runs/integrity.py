"""Checksums of a checkpoint's files, so that a damaged checkpoint is never loaded.

torch ignores a missing shard in silence, and loads a flipped bit as a weight. So the writer of a file computes its
checksum, ``state.json`` holds all checksums, and a reader compares them before it loads anything.
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
FORMAT = 2  # of a checkpoint: 2 has this number in state.json. Format 1 is the same without it, and is read too
_CHUNK = 2**22
_READERS = 8


class FileSum(NamedTuple):
    """Size in bytes and checksum. CRC-32 finds every flipped bit and short burst; it does not stop an attacker."""

    size: int
    crc32: int

    def add(self, data: bytes) -> FileSum:
        """Return the sum of the data so far followed by ``data``."""
        return FileSum(self.size + len(data), zlib.crc32(data, self.crc32))


NOTHING = FileSum(0, 0)  # of an empty file
Files = dict[str, FileSum]  # by the file's path relative to the folder


class Damaged(CheckpointError):
    """A checkpoint's files differ from what was written."""


@dataclass(frozen=True)
class Written:
    """A ``SaveJob`` that is finished."""

    files: Files

    def done(self) -> bool:
        return True

    def result(self, timeout_s: float | None = None) -> Files:
        return self.files


def sum_of(stream: IO[bytes]) -> FileSum:
    """Return size and checksum of everything that is left in the stream."""
    total = NOTHING
    while data := stream.read(_CHUNK):
        total = total.add(data)
    return total


def write_record(folder: StoragePath, record: Mapping[str, Any], files: Files) -> None:
    """Write ``state.json``: the loop's record, the format, the files' checksums, and a checksum of all of it."""
    tree = {**record, "format": FORMAT, "files": files}
    (folder / STATE_FILE).write_text(json.dumps({**tree, "crc32": _crc_of(tree)}))


def read_record(folder: StoragePath) -> tuple[dict[str, Any], Files]:
    """Return the record and files that ``write_record`` was given.

    Raises:
      Damaged: ``state.json`` was changed.
      CheckpointError: a newer version of this service wrote it.
    """
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
    if (form := tree.pop("format", 1)) > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {form}, this version of the service reads formats up to {FORMAT}; go on "
            "with the version that wrote it or a later one, or choose another --run-dir"
        )
    return tree, {name: FileSum(*values) for name, values in tree.pop("files").items()}


def verify(folder: StoragePath) -> dict[str, Any]:
    """Read every file of a checkpoint, compare it with its checksum, and return the checkpoint's record.

    Raises:
      Damaged: a file is missing, unexpected, or not as it was written.
      CheckpointError: the storage does not answer.
    """
    try:
        record, wanted = read_record(folder)
        present = set(files_below(folder)) - {STATE_FILE}
        unmatched = sorted(wanted.keys() ^ present)
        if unmatched:
            name = unmatched[0]
            raise Damaged(f"{name} is missing" if name in wanted else f"{name} is none of its files")
        with ThreadPoolExecutor(_READERS) as readers:  # zlib.crc32 releases the GIL
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
    """Return the checksum of ``tree`` as JSON, independent of spacing and key order."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(tree)), sort_keys=True).encode())
