"""The noise study's tables come from the sweeps' own records, with differences paired by seed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tune_sweeps.grid import GRIDS
from tune_sweeps.records import Sweep, TrialState, save_sweep


@pytest.fixture
def study() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "noise_study.py"
    spec = importlib.util.spec_from_file_location("noise_study", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, arm: str, seed: int, accuracy: float, status: str = "done") -> None:
    trial = folder / "trials" / f"{arm}-seed{seed}"
    trial.mkdir(parents=True)
    TrialState(arm, seed, status).save(trial)  # type: ignore[arg-type]
    rows = [
        {"step": step, "eval/id/accuracy": value, "eval/ood/accuracy": value / 2}
        for step, value in ((0, 0.5), (1, 0.6), (2, accuracy))
    ]
    (trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tables_and_picture(study: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "down10"
    save_sweep(Sweep(folder, GRIDS["noise-study"], "demo", [], [0, 1, 2], None, None))
    for seed, gap in enumerate((0.1, 0.2, 0.3)):
        write(folder, "dvpo", seed, 0.9)
        write(folder, "grpo", seed, 0.9 - gap)
    write(folder, "ppo", 0, 0.1, status="failed")
    results = study.read(tmp_path)
    assert results["down10"]["id"].keys() == {"dvpo", "grpo"}, "finished trials alone"
    table = study.table("down10", results["down10"]).splitlines()
    assert table[0] == "**10 % of the rewards hit by a spike of -|N(0, 20)|**, 3 seeds"
    assert table[4] == "| DVPO | 0.600 | **0.900** | 0.900 |  | 0.450 |  |"
    # Student's t at 95 % with two degrees of freedom: 4.303 x 10 points / sqrt(3) = 24.8.
    assert table[5].startswith("| GRPO | 0.600 | **0.700** | 0.600 | -20.0 (-44.8 to +4.8) | 0.350 |")
    assert len(study.draw(results).axes) == 1


def test_its_arms_are_those_of_the_grid(study: ModuleType) -> None:
    assert study.LABELS.keys() == {arm.name for arm in GRIDS["noise-study"].arms}
