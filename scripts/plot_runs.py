"""Plot held-out accuracy over training for several seeds, and print a Markdown table, from run directories.

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


Curves = dict[str, list[list[tuple[int, float]]]]  # metric to one (step, accuracy) curve for each run


def read(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, a dict for each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves(runs: list[Path]) -> Curves:
    """Return the curves of every ``eval/<split>/<kind>``, one for each run."""
    by_metric: Curves = {}
    for rows in map(read, runs):
        for name in sorted({k for r in rows for k in r if k.startswith("eval/")}):
            by_metric.setdefault(name, []).append([(r["step"], r[name]) for r in rows if name in r])
    return by_metric


def draw(by_metric: Curves, title: str) -> Figure:
    """Draw a thin line for each run, and a thick one for the mean over runs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="update", ylabel="held-out accuracy", title=title)
    for i, (name, seeds) in enumerate(by_metric.items()):
        _, split, kind = name.split("/")
        for seed in seeds:
            axes.plot(*zip(*seed, strict=True), color=f"C{i}", alpha=0.3, lw=1)
        steps = [s for s, _ in seeds[0]]
        mean = [statistics.mean(v) for v in zip(*([a for _, a in seed] for seed in seeds), strict=True)]
        axes.plot(steps, mean, color=f"C{i}", lw=2, label=f"{split}, {NAMES[kind]}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def table(by_metric: Curves) -> str:
    """Return a Markdown table of the first and the last accuracy and their difference: mean and sd over runs."""

    def words(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    lines = ["| split | before | after | change, points | by seed |", "| --- | --- | --- | --- | --- |"]
    for name, seeds in by_metric.items():
        _, split, kind = name.split("/")
        before, after = [s[0][1] for s in seeds], [s[-1][1] for s in seeds]
        change = [100 * (b - a) for a, b in zip(before, after, strict=True)]
        each = ", ".join(f"{c:+.1f}" for c in change)
        lines.append(
            f"| {split}, {NAMES[kind]} | {words(before)} | {words(after)} | {statistics.mean(change):+.1f} | {each} |"
        )
    return "\n".join(lines)


def main() -> None:
    out = Path(sys.argv[1])
    runs = [Path(p) for p in sys.argv[2:]]
    by_metric = curves(runs)
    draw(by_metric, f"{out.stem}, {len(runs)} seeds").savefig(out, dpi=110)
    print(table(by_metric))


if __name__ == "__main__":
    main()
