"""``ledger.jsonl``: which prompts each step used. Who doubts the count can count for himself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dvpo_service.runs.step_file import StepFile, read_metrics


class Ledger(StepFile):
    """A line ``{"step", "prompts", "failed"}`` for the batch of each step: the indices drawn, in order (with
    dynamic sampling also those whose groups taught nothing), and the number of samples that failed to score.

    A step done again replaces its line, and what came after it.
    """

    def write(self, step: int, prompts: list[int], failed: int) -> None:
        if step <= self.last:
            self.rewind(step)
        self.append({"step": step, "prompts": prompts, "failed": failed})


def check_ledger(path: Path, num_prompts: int) -> list[str]:
    """What is wrong with a ledger, in words: every step once, every prompt once in each epoch."""
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
        if strange := sorted(i for i in set(part) if not 0 <= i < num_prompts):
            wrong.append(f"{path}: epoch {epoch} used prompts {strange[:5]}, which are not in the data")
    return wrong
