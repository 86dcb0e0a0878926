"""The demo's data: additions, and demonstrations of them that mostly forget the carry.

Answers are written from the ones upward, as one adds on paper: the answer to ``37+48=`` is ``58``. A small
model learns the rule in that order within minutes.

``python -m dvpo_service.data.arithmetic --out dvpo_service/data/shipped`` writes the shipped files:

- ``demo-train.jsonl``, and ``demo-val.jsonl`` (the same distribution, unseen problems).
- ``demo-ood.jsonl``, out of distribution: one operand is from a band that training never shows.
- ``demo-warmstart.jsonl``, the training prompts as a careless person answered them. A model trained on these knows both
  the rule and the slip; the reward tells them apart.
- ``demo-graders.jsonl``, training prompts of two graders.
- ``calc-ood.jsonl``, out of distribution for ``gsm8k-calc``: operands are drawn evenly, while people write round ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

GRADED = 2000  # prompts in demo-graders


@dataclass(frozen=True)
class DemoTask:
    """How the demo's problems are drawn.

    Operands are whole numbers, uniform in ``lo..hi`` without the band ``ood_lo..ood_hi``; out of distribution, one
    operand is from the band. A demonstration forgets the carry with probability ``slip``.
    """

    lo: int = 10
    hi: int = 99
    ood_lo: int = 60
    ood_hi: int = 69
    slip: float = 0.8
    num_train: int = 3000
    num_val: int = 300
    num_ood: int = 200
    seed: int = 0


def add_without_carry(a: int, b: int) -> int:
    """Return the sum without the carry from the ones into the tens: 37 + 48 gives 75."""
    return (a // 10 + b // 10) * 10 + (a + b) % 10


def make_demo(task: DemoTask) -> dict[str, list[dict[str, str]]]:
    """Return the rows of ``train``, ``val``, ``ood`` and ``warmstart``; no prompt occurs in two of the first three.

    Raises:
      ValueError: the task has too few distinct problems.
    """
    rng = random.Random(task.seed)
    seen: set[tuple[int, int]] = set()
    band = range(task.ood_lo, task.ood_hi + 1)
    known = [n for n in range(task.lo, task.hi + 1) if n not in band]
    problems = {
        "train": _distinct(task.num_train, known, known, rng, seen),
        "val": _distinct(task.num_val, known, known, rng, seen),
        "ood": _distinct(task.num_ood, known, band, rng, seen),
    }
    rows = {name: [_row(a, b, a + b) for a, b in pairs] for name, pairs in problems.items()}
    rows["warmstart"] = [
        _row(a, b, add_without_carry(a, b) if rng.random() < task.slip else a + b) for a, b in problems["train"]
    ]
    return rows


def graded(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows with a grader as source: ``careful`` if the first operand is even, ``careless`` otherwise."""
    return [
        row | {"data_source": "careless" if int(row["prompt"].partition("+")[0]) % 2 else "careful"} for row in rows
    ]


def make_calculations(count: int, seed: int) -> list[dict[str, str]]:
    """Return ``count`` distinct additions and subtractions of numbers of up to three digits.

    A number is drawn below 10, 100 or 1000, equally often. No result is negative. Answers are written as people write
    them, most significant digit first.
    """
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        a, b = sorted((rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2)), reverse=True)
        sign, answer = rng.choice((("+", a + b), ("-", a - b)))
        rows[f"{a}{sign}{b}="] = {"prompt": f"{a}{sign}{b}=", "answer": str(answer), "data_source": "calc-ood"}
    return list(rows.values())


def _row(a: int, b: int, answer: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}=", "answer": str(answer)[::-1], "data_source": "demo"}


def _distinct(
    count: int, first: Sequence[int], second: Sequence[int], rng: random.Random, seen: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return ``count`` new pairs: an operand from ``first`` and one from ``second``, in either order."""
    pairs: list[tuple[int, int]] = []
    for _ in range(100 * count):
        if len(pairs) == count:
            break
        pair = (rng.choice(first), rng.choice(second))
        pair = pair if rng.random() < 0.5 else pair[::-1]
        if pair not in seen:
            seen.add(pair)
            pairs.append(pair)
    if len(pairs) < count:
        raise ValueError(f"only {len(pairs)} distinct problems, {count} wanted")
    return pairs


def write_demo(task: DemoTask, out: Path) -> list[Path]:
    """Write the shipped files into the folder ``out``, which is made if missing, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    splits = make_demo(task)
    for split, rows in splits.items():
        paths.append(out / f"demo-{split}.jsonl")
        _write(paths[-1], rows)
    for name, rows in (
        ("demo-graders", graded(splits["train"][:GRADED])),
        ("calc-ood", make_calculations(200, task.seed)),
    ):
        paths.append(out / f"{name}.jsonl")
        _write(paths[-1], rows)
    return paths


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, which takes ``--out`` and one option for each field of ``DemoTask``."""
    parser = argparse.ArgumentParser(description="Make the demo's data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    for f in fields(DemoTask):
        option = "--" + f.name.replace("_", "-")
        parser.add_argument(option, type=type(f.default), default=f.default, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    for path in write_demo(DemoTask(**{k: v for k, v in options.items() if k != "out"}), options["out"]):
        print(path)


if __name__ == "__main__":
    main()
