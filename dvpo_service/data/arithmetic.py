"""The demo's own data: sums and differences, made up by a seed.

``python -m dvpo_service.data.arithmetic --out dvpo_service/data/shipped`` writes what is
shipped: ``demo-train.jsonl``, ``demo-val.jsonl`` (the same distribution, unseen) and
``demo-ood.jsonl`` (out of distribution: one operand from a band that training never shows).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

FAMILIES = ("add2", "sub2", "add3", "sub3", "mod")


@dataclass(frozen=True)
class DemoTask:
    """Whole operands, uniform in ``lo..hi`` without the band ``ood_lo..ood_hi``; out of distribution
    one of them is from the band."""

    families: str = "add2,sub2"
    lo: int = 0
    hi: int = 99
    ood_families: str = "add2,sub2"
    ood_lo: int = 60
    ood_hi: int = 69
    num_train: int = 3000
    num_val: int = 300
    num_ood: int = 200
    seed: int = 0


def make_demo(task: DemoTask) -> dict[str, list[dict[str, str]]]:
    """Rows of ``train``, ``val`` and ``ood``; no prompt occurs twice in all of them.

    Raises ``ValueError`` for an unknown family, or when the task has too few distinct problems.
    """
    seen: set[str] = set()
    rng = random.Random(task.seed)
    band = range(task.ood_lo, task.ood_hi + 1)
    operands = [n for n in range(task.lo, task.hi + 1) if n not in band]
    known = task.num_train + task.num_val
    rows = _distinct(known, task.families, operands, None, rng, seen)
    ood = _distinct(task.num_ood, task.ood_families, operands, band, rng, seen)
    return {"train": rows[: task.num_train], "val": rows[task.num_train :], "ood": ood}


def make_problem(
    family: str, operands: Sequence[int], band: Sequence[int] | None, rng: random.Random
) -> tuple[str, str]:
    """One prompt and its answer (never negative); with ``band`` one operand is drawn from there."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    numbers = [rng.choice(operands) for _ in range(3 if family.endswith("3") else 2)]
    if band:
        numbers[rng.randrange(len(numbers))] = rng.choice(band)
    if family.startswith("add"):
        return "+".join(map(str, numbers)) + "=", str(sum(numbers))
    if family == "mod":
        return f"{max(numbers)}%{max(1, min(numbers))}=", str(max(numbers) % max(1, min(numbers)))
    numbers.sort(reverse=True)
    if family == "sub3":  # a+b-c
        return f"{numbers[0]}+{numbers[1]}-{numbers[2]}=", str(numbers[0] + numbers[1] - numbers[2])
    return f"{numbers[0]}-{numbers[1]}=", str(numbers[0] - numbers[1])


def _distinct(
    count: int,
    families: str,
    operands: Sequence[int],
    band: Sequence[int] | None,
    rng: random.Random,
    seen: set[str],
) -> list[dict[str, str]]:
    names = families.split(",")
    rows: list[dict[str, str]] = []
    for _ in range(100 * count):
        if len(rows) == count:
            break
        family = names[len(rows) % len(names)]  # in turn, so that families are equally many
        prompt, answer = make_problem(family, operands, band, rng)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "answer": answer, "data_source": f"demo/{family}"})
    if len(rows) < count:
        raise ValueError(f"{families}: only {len(rows)} distinct problems, {count} wanted")
    return rows


def write_demo(task: DemoTask, out: Path) -> list[Path]:
    """Writes ``demo-<split>.jsonl`` for each split into the folder ``out``, made if missing."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, rows in make_demo(task).items():
        paths.append(out / f"demo-{split}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: ``--out`` and one option for each field of ``DemoTask``."""
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
