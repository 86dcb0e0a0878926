"""Which files are meant, and their rows one by one with their numbers."""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dvpo_service.data.badrow import BadRow
from dvpo_service.errors import DataError

JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet",)


def expand_files(files: Sequence[str | Path]) -> list[Path]:
    """Existing files in the given order, a glob's matches sorted, none twice.

    Raises ``DataError`` for a missing file, a folder, a glob without a match, no files at all.
    """
    if isinstance(files, str | Path):
        raise TypeError("files is a sequence of paths, not one path")
    found: dict[Path, None] = {}
    for name in files:
        path = Path(name).expanduser()
        if path.is_file():
            found[path] = None
        elif glob.has_magic(str(path)):
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
            if not matches:
                raise DataError(f"{path}: no file matches this pattern; check it against `ls {path.parent}`")
            found.update(dict.fromkeys(matches))
        else:
            raise DataError(_missing(path))
    if not found:
        raise DataError("no data files are given; name at least one .jsonl or .parquet file")
    return list(found)


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: this is a folder; name its files, e.g. {path}/*.jsonl"
    if not path.parent.is_dir():
        return f"{path}: data file not found, nor its folder {path.parent}; check the path"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.4)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"nothing in {path.parent} has a like name"
    return f"{path}: data file not found; {hint}"


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Where each row stands (``file:line``, or ``file row N``), and the row, or a ``BadRow`` in its place.

    Streamed; blank JSONL lines are passed over. Raises ``DataError`` for a file that cannot be read.
    """
    try:
        if path.suffix.lower() in JSONL:
            yield from _read_jsonl(path)
        elif path.suffix.lower() in PARQUET:
            yield from _read_parquet(path)
        else:
            raise DataError(f"{path}: unknown file type {path.suffix!r}; accepted: .jsonl, .parquet")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or _first_line(error)}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:  # bytes: one line that is not UTF-8 must not hide its number
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))  # -sig: some editors put a byte order mark first
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("malformed JSON", f"malformed JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; endless nesting
        return BadRow("malformed JSON", f"malformed JSON: {_first_line(error)}")


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not readable as Parquet after row {number}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
