"""``ledger.jsonl``: which prompts each step used, and a check that every prompt was used once per epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dvpo_service.runs.step_file import StepFile, read_metrics


class Ledger(StepFile):
    """A line ``{"step", "prompts", "failed"}`` for the batch of each step.

    ``prompts`` are the indices drawn, in order; with dynamic sampling they include the prompts whose groups were
    dropped. ``failed`` is the number of samples that failed to score. A step done again replaces its line and removes
    every later one.
    """

    def write(self, step: int, prompts: list[int], failed: int) -> None:
        """Write the line of ``step``, the number of updates done before its batch."""
        if step <= self.last:
            self.rewind(step)
        self.append({"step": step, "prompts": prompts, "failed": failed})


def check_ledger(path: Path, num_prompts: int) -> list[str]:
    """Return what is wrong with a ledger, a sentence each: every step must occur once, every prompt once per epoch."""
    rows = read_metrics(path)
    wrong = []
    if [r["step"] for r in rows] != list(range(len(rows))):
        wrong.append(f"{path}: the steps are not 0 to {len(rows) - 1}, each once")
    used = [i for row in rows for i in row["prompts"]]
    for epoch, start in enumerate(range(0, len(used), num_prompts)):
        part = used[start : start + num_prompts]
        repeated = sorted(i for i, n in Counter(part).items() if n > 1)
        if repeated:
            wrong.append(f"{path}: epoch {epoch} used prompts {repeated[:5]} more than once")
        if unknown := sorted(i for i in set(part) if not 0 <= i < num_prompts):
            wrong.append(f"{path}: epoch {epoch} used prompts {unknown[:5]}, which are not in the data")
    return wrong
