"""Held-out accuracy over training, over seeds: a picture and a Markdown table from run directories.

python scripts/plot_runs.py OUT.png RUN_DIR [RUN_DIR ...]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NAMES = {"accuracy": "sampled", "greedy": "greedy"}


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves(runs: list[Path]) -> dict[str, list[list[tuple[int, float]]]]:
    """``eval/<split>/<kind>`` to one (step, accuracy) curve a run."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for rows in map(read, runs):
        for name in sorted({k for r in rows for k in r if k.startswith("eval/")}):
            found.setdefault(name, []).append([(r["step"], r[name]) for r in rows if name in r])
    return found


def draw(found: dict[str, list[list[tuple[int, float]]]], title: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="update", ylabel="held-out accuracy", title=title)
    for i, (name, seeds) in enumerate(found.items()):
        _, split, kind = name.split("/")
        for seed in seeds:
            axes.plot(*zip(*seed, strict=True), color=f"C{i}", alpha=0.3, lw=1)
        steps = [s for s, _ in seeds[0]]
        mean = [statistics.mean(v) for v in zip(*([a for _, a in seed] for seed in seeds), strict=True)]
        axes.plot(steps, mean, color=f"C{i}", lw=2, label=f"{split}, {NAMES[kind]}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def table(found: dict[str, list[list[tuple[int, float]]]]) -> str:
    def words(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    lines = ["| split | before | after | change, points | by seed |", "| --- | --- | --- | --- | --- |"]
    for name, seeds in found.items():
        _, split, kind = name.split("/")
        before, after = [s[0][1] for s in seeds], [s[-1][1] for s in seeds]
        change = [100 * (b - a) for a, b in zip(before, after, strict=True)]
        each = ", ".join(f"{c:+.1f}" for c in change)
        lines.append(
            f"| {split}, {NAMES[kind]} | {words(before)} | {words(after)} | {statistics.mean(change):+.1f} | {each} |"
        )
    return "\n".join(lines)


def main() -> None:
    out, runs = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]
    found = curves(runs)
    draw(found, f"{out.stem}, {len(runs)} seeds").savefig(out, dpi=110)
    print(table(found))


if __name__ == "__main__":
    main()
