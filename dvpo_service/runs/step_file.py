"""Files with one JSON line per step, such as ``metrics.jsonl``. Restarts leave every step in the file once."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvpo_service.errors import TrackingError


class StepFile:
    """One JSON object per line and step, in the order of steps, in the file when ``append`` returns.

    Args:
      path: the file; it and its folder are made if missing.
      resume_step: lines of this step and later that the file already has are removed, as those steps are done again.

    Raises:
      TrackingError: the file is damaged.
    """

    def __init__(self, path: Path, resume_step: float = math.inf) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = self.rewind(resume_step)

    def rewind(self, step: float) -> list[dict[str, Any]]:
        """Remove the lines of ``step`` and later, and return the remaining rows."""
        rows = [row for row in read_metrics(self.path) if row["step"] < step]
        # Write another file and rename it: a crash here leaves the old file or the new one, never half a file.
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self.last = rows[-1]["step"] if rows else -1
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Write the line of ``row["step"]``. Raises ValueError unless that step is later than every step so far."""
        if row["step"] <= self.last:
            raise ValueError(f"step {row['step']} was logged already: log everything of a step in one call")
        self.last = row["step"]
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsFile(StepFile):
    """A file of lines ``{"step", "time", <metric>: value}``."""

    def write(self, step: int, metrics: Mapping[str, float], now: float | None = None) -> None:
        """Write one step's line. NaN and infinity become null, as JSON has neither. ``now`` is a Unix time."""
        row: dict[str, Any] = {"step": int(step), "time": time.time() if now is None else now}
        for name, value in metrics.items():
            row[name] = float(value) if math.isfinite(value) else None
        self.append(row)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all rows in file order, or none if there is no file. An incomplete last line is left out.

    Raises:
      TrackingError: another line is not JSON, or has no integer step.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the process died while it wrote this line
                break
            raise TrackingError(f"{path} line {number} is not JSON: mend or remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise TrackingError(f"{path} line {number} has no integer 'step': mend or remove the line")
        rows.append(row)
    return rows
