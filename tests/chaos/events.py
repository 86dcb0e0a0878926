"""Events of a run with faults, one JSON object a line, written by the driver and by the harness."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Events:
    """Rows with ``event`` and ``time`` [s since the epoch]:

    struck {id, kind, victim, step, stage, during}      seen, over {id}: noticed, and recovered from
    lost, starting, started, back {pool, number}        ready {}: all pools of a driver serve
    step {step, skipped, failed}                        note {text}: a line in the terminal
    """

    file: Path

    def write(self, event: str, **fields: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time()} | fields) + "\n")

    def read(self, *names: str) -> list[dict[str, Any]]:
        """Return the events with one of the names, or all events if no name is given."""
        if not self.file.exists():
            return []
        lines = self.file.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last line may be incomplete
        return [r for r in rows if not names or r["event"] in names]
