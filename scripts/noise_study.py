"""The study of docs/noise-study.md: a sweep for each noise, then its tables, its picture and the numbers behind both.

python scripts/noise_study.py run FOLDER [KEY=VALUE ...]   # the sweeps; again with what is there, it continues
python scripts/noise_study.py show FOLDER                  # docs/noise-study/results.json and curves.png, and tables

Two cores take about 25 minutes for each noise. ``model.path=FOLDER`` starts from a base model that is there already
(``dvpo warmstart --config demo``); without it the first sweep makes one for each seed, four minutes each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from tune_sweeps.comparison import interval
from tune_sweeps.measures import finished
from tune_sweeps.records import read_sweep

NOISES = {
    "down10": ("10 % of the rewards hit by a spike of -|N(0, 20)|", "{kind: spike, p: 0.1, sd: 20, sign: down}"),
    "spikes30": ("30 % of the rewards hit by a spike of N(0, 20)", "{kind: spike, p: 0.3, sd: 20}"),
    "none": ("no noise", "{kind: none}"),
    "flips40": ("40 % of the rewards flipped", "{kind: flip, p: 0.4}"),
    "t2": ("Student t noise, 2 degrees of freedom", "{kind: student_t, df: 2, scale: 1.0}"),
}
SEEDS = 5
SETTINGS = [
    *("cluster.in_process=true", "trainer.num_steps=50", "trainer.eval_every=10", "trainer.save_every=0"),
    *("policy.optim.schedule=constant", "tracking.mlflow=false", "data.val_limit=200"),
]
LABELS = {
    "dvpo": "DVPO",
    "dvpo-mean": "DVPO, mean-based advantage",
    "ppo": "PPO",
    "ppo-max-advantage-1": "PPO, advantage within ±1",
    "ppo-reward-in-0-1": "PPO, reward within [0, 1]",
    "grpo": "GRPO",
}
OUT = Path(__file__).parents[1] / "docs" / "noise-study"

# Accuracies by noise, split, arm and seed: [[update, accuracy], ...].
Results = dict[str, dict[str, dict[str, dict[str, list[list[float]]]]]]


def run(folder: Path, keys: list[str]) -> None:
    """Run the sweep of every noise, or continue it."""
    for name, (_, noise) in NOISES.items():
        resume = ["--resume"] if (folder / name / "sweep.json").exists() else []
        sweep = ["sweep", "--config", "demo", "--grid", "noise-study", "--seeds", str(SEEDS), *resume]
        command = [*sweep, "--run-dir", str(folder / name), *SETTINGS, *keys, f"reward.noise={noise}"]
        subprocess.run([sys.executable, "-m", "dvpo_service", *command], check=True)


def read(folder: Path) -> Results:
    """Return the accuracies of the finished trials of every noise that has some."""
    results: Results = {}
    for name in NOISES:
        if not (folder / name / "sweep.json").exists():
            continue
        sweep = read_sweep(folder / name)
        for arm in LABELS:
            for trial in finished(sweep, arm):
                for split in ("id", "ood"):
                    key = f"eval/{split}/accuracy"
                    points = [[row["step"], round(row[key], 4)] for row in trial.metrics if key in row]
                    of_arm = results.setdefault(name, {}).setdefault(split, {}).setdefault(arm, {})
                    of_arm[str(trial.state.seed)] = points
    return results


def table(noise: str, splits: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: accuracy by update, the worst seed, and the difference from DVPO with its interval."""
    arms = splits["id"]
    steps = [int(step) for step, _ in next(iter(arms["dvpo"].values()))][1:]
    lines = [f"**{NOISES[noise][0]}**, {len(arms['dvpo'])} seeds", ""]
    lines += ["| method | " + " | ".join(f"{s}" for s in steps) + " | worst seed | minus DVPO | ood | ood minus DVPO |"]
    lines += ["| --- |" + " --- |" * (len(steps) + 4)]
    for arm, seeds in arms.items():
        means = [fmean(points[k + 1][1] for points in seeds.values()) for k in range(len(steps))]
        worst = min(points[-1][1] for points in seeds.values())
        out = splits["ood"][arm]
        cells = [*(f"{m:.3f}" for m in means[:-1]), f"**{means[-1]:.3f}**", f"{worst:.3f}", _minus(arms, arm)]
        cells += [f"{fmean(points[-1][1] for points in out.values()):.3f}", _minus(splits["ood"], arm)]
        lines.append(f"| {LABELS[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _minus(arms: dict[str, Any], arm: str) -> str:
    """Return the arm's last accuracy minus DVPO's in points, paired by seed, with Student's t interval."""
    if arm == "dvpo":
        return ""
    seeds = [seed for seed in arms[arm] if seed in arms["dvpo"]]
    differences = [100 * (arms[arm][seed][-1][1] - arms["dvpo"][seed][-1][1]) for seed in seeds]
    low, high = interval(differences)
    within = f" ({low:+.1f} to {high:+.1f})" if low is not None and high is not None else ""
    return f"{fmean(differences):+.1f}{within}"


def draw(results: Results) -> Figure:
    """Draw a panel for each noise: a line for each method's mean over seeds, and a band from the worst to the best."""
    figure = Figure(figsize=(4.2 * len(results), 3.8), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for ax, (noise, splits) in zip(axes, results.items(), strict=True):
        for i, (arm, label) in enumerate(LABELS.items()):
            seeds = list(splits["id"].get(arm, {}).values())
            if not seeds:
                continue
            steps = [step for step, _ in seeds[0]]
            by_step = list(zip(*([value for _, value in points] for points in seeds), strict=True))
            ax.fill_between(
                steps, [min(v) for v in by_step], [max(v) for v in by_step], color=f"C{i}", alpha=0.12, lw=0
            )
            ax.plot(steps, [fmean(v) for v in by_step], color=f"C{i}", lw=2.5 if arm == "dvpo" else 1.5, label=label)
        ax.set_title(NOISES[noise][0].replace(" hit", "\nhit"), fontsize=10)
        ax.set_xlabel("update")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, sampled")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def show(folder: Path) -> None:
    """Write results and picture, and print the tables."""
    results = read(folder)
    OUT.mkdir(exist_ok=True)
    (OUT / "results.json").write_text(json.dumps(results) + "\n")
    draw(results).savefig(OUT / "curves.png", dpi=110)
    print("\n\n".join(table(noise, splits) for noise, splits in results.items()))


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    {"run": lambda: run(Path(folder), rest), "show": lambda: show(Path(folder))}[command]()
