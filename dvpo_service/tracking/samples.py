"""``samples.jsonl``: responses with their rewards, as MLflow's table view wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dvpo_service.runs.step_file import StepFile, read_metrics


class SamplesFile(StepFile):
    """A line ``{"step", "rows": [...]}`` for each step whose samples were logged."""

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of one step; NaN (a failed sample's reward) becomes null."""
        self.append({"step": step, "rows": [{k: _plain(v) for k, v in row.items()} for row in rows]})

    def table(self) -> dict[str, list[Any]]:
        """All rows so far with a ``step`` column, as MLflow's ``log_table`` writes them: columns, and data by row."""
        rows = [{"step": line["step"]} | row for line in read_metrics(self.path) for row in line["rows"]]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
