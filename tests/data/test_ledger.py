"""The ledger of prompts used: one line per step, and a check that finds what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvpo_service.data.cursor import PromptCursor
from dvpo_service.data.ledger import Ledger, check_ledger


def test_a_run_that_goes_back_counts_every_prompt_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    cursor = PromptCursor(10, seed=0)
    ledger = Ledger(path)
    states = []
    for step in range(5):
        states.append(cursor.state_dict())
        ledger.write(step, cursor.take(4), failed=step)
    cursor.load_state_dict(states[2])
    for step in (2, 3):  # goes back in the same process
        ledger.write(step, cursor.take(4), failed=0)
    cursor.load_state_dict(states[3])
    ledger = Ledger(path)  # goes back in another process
    for step in range(3, 6):
        ledger.write(step, cursor.take(4), failed=0)
    assert check_ledger(path, 10) == []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4, 5]
    assert [r["failed"] for r in rows] == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(0, [0, 1]), (1, [1, 2])], "epoch 0 used prompts \\[1\\] more than once"),
        ([(0, [0, 1]), (2, [2, 3])], "not 0 to 1"),
        ([(0, [0, 9]), (1, [2, 3])], "epoch 0 used prompts \\[9\\], which are not in the data"),
    ],
    ids=["repeated", "a step is missing", "unknown"],
)
def test_what_is_wrong_is_found(tmp_path: Path, rows: list[tuple[int, list[int]]], words: str) -> None:
    import re

    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step, prompts in rows:
        ledger.append({"step": step, "prompts": prompts, "failed": 0})
    assert any(re.search(words, w) for w in check_ledger(tmp_path / "ledger.jsonl", 4))
