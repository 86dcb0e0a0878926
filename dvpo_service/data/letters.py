"""The data of ``demo-credit``: write the next letter of each of twelve letters.

An answer is twelve small decisions, and the reward is the share of right ones: one number, in which each decision is a
twelfth. Demonstrations copy a letter in place of the next one half of the time.

``python -m dvpo_service.data.letters --out dvpo_service/data/shipped`` writes the shipped files:
``credit-train.jsonl``, ``credit-val.jsonl``, ``credit-ood.jsonl`` (every letter twice in a row, which training never
shows) and ``credit-warmstart.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase as LETTERS


@dataclass(frozen=True)
class LettersTask:
    """How the problems are drawn. A demonstration copies a letter with probability ``slip``."""

    length: int = 12
    slip: float = 0.5
    num_train: int = 2000
    num_val: int = 200
    num_ood: int = 200
    seed: int = 0


def next_letters(text: str) -> str:
    """Return the text with each letter replaced by the next one of the alphabet; after z comes a."""
    return "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in text)


def make_letters(task: LettersTask) -> dict[str, list[dict[str, str]]]:
    """Return the rows of ``train``, ``val``, ``ood`` and ``warmstart``."""
    rng = random.Random(task.seed)
    sizes = {"train": task.num_train, "val": task.num_val}
    texts = {name: [_text(task.length, rng) for _ in range(n)] for name, n in sizes.items()}
    texts["ood"] = [
        "".join(2 * c for c in _text((task.length + 1) // 2, rng))[: task.length] for _ in range(task.num_ood)
    ]
    rows = {name: [_row(text, next_letters(text)) for text in drawn] for name, drawn in texts.items()}
    rows["warmstart"] = [
        _row(text, "".join(c if rng.random() < task.slip else next_letters(c) for c in text)) for text in texts["train"]
    ]
    return rows


def write_letters(task: LettersTask, out: Path) -> list[Path]:
    """Write the files into the folder ``out``, which is made if missing, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, rows in make_letters(task).items():
        paths.append(out / f"credit-{split}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def _row(text: str, answer: str) -> dict[str, str]:
    return {"prompt": f"{text}=", "answer": answer, "data_source": "credit"}


def _text(length: int, rng: random.Random) -> str:
    """Return random letters, no letter twice in a row."""
    text = rng.choice(LETTERS)
    while len(text) < length:
        letter = rng.choice(LETTERS)
        text += letter if letter != text[-1] else ""
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, which takes ``--out``."""
    parser = argparse.ArgumentParser(description="Make the data of demo-credit.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    for path in write_letters(LettersTask(), parser.parse_args(argv).out):
        print(path)


if __name__ == "__main__":
    main()
