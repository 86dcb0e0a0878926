"""The data of demo-credit: what is shipped is what the code makes, and means what its names say."""

from __future__ import annotations

import json
from pathlib import Path

from dvpo_service.data.letters import LettersTask, make_letters, next_letters, write_letters
from dvpo_service.data.splits import resolve_file
from dvpo_service.rewards.share_right import score


def test_the_shipped_files_are_what_the_code_writes(tmp_path: Path) -> None:
    for path in write_letters(LettersTask(), tmp_path):
        assert path.read_text() == Path(resolve_file(f"shipped:{path.name}")).read_text()


def test_answers_and_demonstrations() -> None:
    rows = make_letters(LettersTask(num_train=300))
    for split in ("train", "val", "ood"):
        for row in rows[split]:
            assert row["answer"] == next_letters(row["prompt"].removesuffix("="))
    assert next_letters("abz") == "bca"
    right = [score(row["answer"], next_letters(row["prompt"].removesuffix("="))) for row in rows["warmstart"]]
    assert abs(sum(right) / len(right) - 0.5) < 0.03


def test_out_of_distribution_letters_come_in_pairs_which_training_never_shows() -> None:
    rows = make_letters(LettersTask())
    assert all(p[i] == p[i + 1] for row in rows["ood"] for p in [row["prompt"]] for i in range(0, 12, 2))
    assert not any(a == b for row in rows["train"] for a, b in zip(row["prompt"], row["prompt"][1:], strict=False))
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["val"]}
    assert json.dumps(rows["train"][0])
