"""Find the data files, and read their rows one by one with their line numbers."""

from __future__ import annotations

import codecs
import difflib
import glob
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dvpo_service.data.badrow import BadRow, show
from dvpo_service.errors import DataError

JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".zst", ".bz2")


def expand_files(files: Sequence[str | Path]) -> list[Path]:
    """Return the files in the given order, with globs expanded and sorted, and none twice.

    Raises:
      DataError: a file is missing or is a folder, a glob has no match, or no files are given.
    """
    if isinstance(files, str | Path):
        raise TypeError("files is a sequence of paths, not one path")
    paths: dict[Path, None] = {}  # a dict keeps the order
    for name in files:
        try:
            paths.update(dict.fromkeys(_expand(Path(name).expanduser())))
        except (OSError, RuntimeError) as error:  # a name too long for a file, or `~user` of an unknown user
            raise DataError(
                f"{show(str(name), 200)}: no such data file: {_first_line(error)}; check the path"
            ) from error
    if not paths:
        raise DataError("no data files are given; name at least one .jsonl or .parquet file")
    return list(paths)


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(_missing(path))
    matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if not matches:
        raise DataError(f"{path}: no file matches this pattern; check it against `ls {path.parent}`")
    return matches


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: this is a folder; name its files, e.g. {path}/*.jsonl"
    if not path.parent.is_dir():
        return f"{path}: data file not found, nor its folder {path.parent}; check the path"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.4)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"nothing in {path.parent} has a like name"
    return f"{path}: data file not found; {hint}"


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield each row with its place (``file:line``, or ``file row N``); for a row that cannot be read, a ``BadRow``.

    Files are streamed. Blank JSONL lines are skipped. Raises ``DataError`` for a file that cannot be read.
    """
    try:
        if _uncompressed(path).suffix.lower() in JSONL:
            yield from _read_jsonl(path)
        elif path.suffix.lower() in PARQUET:
            yield from _read_parquet(path)
        else:
            raise DataError(
                f"{path}: unknown file type {path.suffix!r}; accepted: .jsonl, .parquet, and .jsonl compressed as "
                f"{', '.join(COMPRESSED)}"
            )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or _first_line(error)}") from error


def _uncompressed(path: Path) -> Path:
    """Return the path without the suffix of its compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    compression = "detect" if path.suffix.lower() in COMPRESSED else None
    # As bytes, so that the number of a line that is not UTF-8 is known.
    with pa.input_stream(str(path), compression=compression) as stream, io.BufferedReader(stream) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)  # some editors put a byte order mark first
            if line.strip():
                yield f"{path}:{number}", _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("malformed JSON", f"malformed JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or very deep nesting
        return BadRow("malformed JSON", f"malformed JSON: {_first_line(error)}")


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in _to_python(batch):
                    number += 1
                    yield f"{path} row {number}", row
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not readable as Parquet after row {number}: {_first_line(error)}") from error


def _to_python(batch: pa.RecordBatch) -> Iterator[object]:
    try:
        yield from batch.to_pylist()
    # One cell fails the whole batch, such as text that is not UTF-8 or a date beyond the year 9999. Find its row.
    except (pa.ArrowException, ValueError, OverflowError):
        yield from (_one_row(batch.slice(i, 1)) for i in range(len(batch)))


def _one_row(batch: pa.RecordBatch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"its text is not UTF-8: {_first_line(error)}")
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return BadRow("wrong type", f"a cell has no Python value: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0] or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in line)  # Arrow quotes a damaged file's bytes
