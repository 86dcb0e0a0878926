"""``metrics.jsonl``: one JSON object per step, each step once, through every restart."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvpo_service.errors import TrackingError


class MetricsFile:
    """Appends ``{"step", "time", <metric>: value}`` lines, on disk when ``write`` returns.

    A run that resumes at ``resume_step`` does those steps again, so their old lines go first.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_metrics(path) if row["step"] < resume_step]
        # Beside and renamed: a crash here leaves the old file or the new one, never half.
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(beside, path)
        self._file = path.open("a", encoding="utf-8")
        self._last = self.rows[-1]["step"] if self.rows else -1

    def write(self, step: int, metrics: Mapping[str, float], now: float | None = None) -> None:
        """One step's line. NaN and infinity become null: JSON has neither."""
        if step <= self._last:
            raise ValueError(f"step {step} was logged already: log everything of a step in one call")
        self._last = step
        row: dict[str, Any] = {"step": int(step), "time": time.time() if now is None else now}
        for name, value in metrics.items():
            row[name] = float(value) if math.isfinite(value) else None
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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
