"""Files with one JSON object per step, each step once, through every restart; ``metrics.jsonl`` is one."""

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
    """One JSON object a line and step, in the order of steps, on disk when ``append`` returns.

    Lines from ``resume_step`` on that the file already has go first: those steps are done again.
    """

    def __init__(self, path: Path, resume_step: float = math.inf) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = self.rewind(resume_step)

    def rewind(self, step: float) -> list[dict[str, Any]]:
        """Take out the lines of ``step`` and later; those that stay."""
        rows = [row for row in read_metrics(self.path) if row["step"] < step]
        # Beside and renamed: a crash here leaves the old file or the new one, never half.
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(beside, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self.last = rows[-1]["step"] if rows else -1
        return rows

    def append(self, row: dict[str, Any]) -> None:
        if row["step"] <= self.last:
            raise ValueError(f"step {row['step']} was logged already: log everything of a step in one call")
        self.last = row["step"]
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsFile(StepFile):
    """Lines ``{"step", "time", <metric>: value}``."""

    def write(self, step: int, metrics: Mapping[str, float], now: float | None = None) -> None:
        """One step's line. NaN and infinity become null: JSON has neither."""
        row: dict[str, Any] = {"step": int(step), "time": time.time() if now is None else now}
        for name, value in metrics.items():
            row[name] = float(value) if math.isfinite(value) else None
        self.append(row)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows in file order; none where there is no file. A torn last line is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the process died while writing it
                break
            raise TrackingError(f"{path} line {number} is not JSON: mend or remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise TrackingError(f"{path} line {number} has no integer 'step': mend or remove the line")
        rows.append(row)
    return rows
