"""Write ``samples.jsonl``: responses with their rewards, for MLflow's table view."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dvpo_service.runs.step_file import StepFile, read_metrics


class SamplesFile(StepFile):
    """A file with a line ``{"step": ..., "rows": [...]}`` for each step whose samples were logged."""

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows of one step. NaN (the reward of a sample that could not be scored) becomes null."""
        self.append({"step": step, "rows": [{k: _plain(v) for k, v in row.items()} for row in rows]})

    def table(self) -> dict[str, list[Any]]:
        """Return all rows so far in the format of MLflow's ``log_table``: ``columns``, and ``data`` row by row.

        The first column is ``step``.
        """
        rows = [{"step": line["step"]} | row for line in read_metrics(self.path) for row in line["rows"]]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
