"""Grids become checked configs; a grid that cannot work is refused before anything starts."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dvpo_service.algo.loss_spec import TERMS
from dvpo_service.config import load_config
from dvpo_service.errors import ConfigError
from tests.sweeps.synthetic import save_trial
from tune_sweeps.grid import ABLATED, GRIDS, Arm, Grid
from tune_sweeps.plan import Job, find_grid, plan_trials
from tune_sweeps.records import Sweep, read_sweep, save_sweep


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_built_in_grids_resolve_on_the_demo_to_distinct_runs(name: str) -> None:
    grid = GRIDS[name]
    trials = plan_trials(grid, "demo", [], [0, 1])
    assert len(trials) == 2 * len(grid.arms)
    assert grid.reference in {a.name for a in grid.arms}
    assert [t.seed for t in trials] == [0] * len(grid.arms) + [1] * len(grid.arms), "seed by seed"


def test_leave_one_out_removes_each_of_the_seven_and_then_all() -> None:
    assert set(ABLATED) == set(TERMS) - {"qr"}
    weights = {
        t.arm.name: t.config.algorithm.dvpo_loss_weights.effective()
        for t in plan_trials(GRIDS["leave-one-out"], "demo", [], [0])
    }
    assert all(w > 0 for w in weights["full"].values())
    for term in ABLATED:
        assert {t for t, w in weights[f"no-{term}"].items() if w == 0} == {term}
    assert {t for t, w in weights["qr-only"].items() if w > 0} == {"qr"}


def test_the_ladder_only_adds() -> None:
    on = [
        {t for t, w in t.config.algorithm.dvpo_loss_weights.effective().items() if w}
        for t in plan_trials(GRIDS["ladder"], "demo", [], [0])
    ]
    assert on[0] == {"qr", "risk"}
    assert on[-1] == set(TERMS)
    assert all(a < b for a, b in pairwise(on))


def test_the_arms_of_a_seed_share_seeds_and_base_model(tmp_path: Path) -> None:
    for trial in plan_trials(GRIDS["heads"], "demo", [], [3]):
        assert trial.config.trainer.seed == 3
        assert trial.config.model.warmstart is not None
        assert trial.config.model.warmstart.seed == 3
    sweep = Sweep(tmp_path, GRIDS["heads"], "demo", [], [3], "parent", "sqlite:///x.db")
    config = Job.of(sweep, {3: "/models/three"}).trial({"trial": ("n_heads=5", 3)}).config
    assert config.model.path == "/models/three"
    assert config.tracking.tags["mlflow.parentRunId"] == "parent"
    assert config.tracking.tags["arm"] == "n_heads=5"
    assert config.algorithm.n_heads == 5


def test_a_drawn_setting_is_an_arm_of_its_own(tmp_path: Path) -> None:
    grid = Grid("mine", "mine", space={"policy.optim.lr": {"loguniform": [1e-5, 1e-3]}})
    job = Job.of(Sweep(tmp_path, grid, "demo", [], [0], None, None), {0: None})
    plan = job.trial({"seed": 0, "space": {"policy.optim.lr": 1.2345e-4}})
    assert re.fullmatch(r"lr=0\.000123~\w{8}-seed0", plan.name)
    assert plan.config.policy.optim.lr == 1.2345e-4
    near = job.trial({"seed": 0, "space": {"policy.optim.lr": 1.2346e-4}})
    assert near.arm.name != plan.arm.name, "rounded for the reader alike, and trained in folders of their own"
    assert near.folder != plan.folder
    assert job.trial({"seed": 0, "space": {"policy.optim.lr": 1e-4}}).name == "lr=0.0001-seed0", "exact as it reads"


@pytest.mark.parametrize("arm", ["Qwen/Qwen2.5-7B", "a/b/c", "..", "50 %", "what?", "x" * 300, "é"])
def test_a_trial_of_any_name_is_read_back(tmp_path: Path, arm: str) -> None:
    arms = (Arm(arm, {}), Arm(arm.replace("/", "_") + "_", {}))
    save_sweep(Sweep(tmp_path, Grid("mine", "mine", arms=arms), "demo", [], [0, 1], None, None))
    for each in arms:
        for seed in (0, 1):
            save_trial(tmp_path, each.name, seed)
    assert [(t.state.arm, t.state.seed) for t in read_sweep(tmp_path).trials] == [
        (each.name, seed) for each in arms for seed in (0, 1)
    ]


def refusal(tmp_path: Path, tree: object) -> str:
    """Return the error for a grid file with this content."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as error:
        plan_trials(find_grid(str(path)), "demo", [], [0])
    return str(error.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "give either arms"),
        ({"arms": {}}, "give either arms"),
        ({"arms": {"a": {}}, "space": {"x": {"choice": [1]}}}, "give either arms"),
        ({"arms": {"a": {}}, "colour": "red"}, "unknown key 'colour'"),
        ({"arms": {"a": [1]}}, "arm 'a' must map dotted config keys"),
        ({"arms": {"a": {}}, "reference": "b"}, "reference 'b' is none of its arms"),
        ({"arms": {"a": {"algorithm.n_headz": 3}}}, "did you mean 'algorithm.n_heads'"),
        ({"arms": {"a": {"algorithm.n_heads": 0}}}, "arm 'a': config demo: algorithm.n_heads"),
        ({"arms": {"a": {}, "b": {"algorithm.n_heads": 3}}}, "arms 'a' and 'b' are the same run"),
        ({"space": {"policy.optim.lr": {"gaussian": [1, 2]}}}, "write one of choice"),
        ({"space": {"policy.optim.lr": 3}}, "write one of choice"),
    ],
)
def test_a_grid_that_means_nothing_is_refused_with_the_reason(tmp_path: Path, tree: object, message: str) -> None:
    assert message in refusal(tmp_path, tree)


def test_no_such_grid() -> None:
    with pytest.raises(ConfigError, match="no grid 'leave-two-out': neither a file nor one of leave-one-out"):
        find_grid("leave-two-out")


def test_seeds_are_distinct() -> None:
    with pytest.raises(ConfigError, match="distinct seeds"):
        plan_trials(GRIDS["forms"], "demo", [], [1, 1])


def test_an_arm_may_not_repeat_what_the_command_says() -> None:
    twice = Grid("twice", "twice", (Arm("a", {}), Arm("b", {"algorithm.dvpo_loss_weights.ablate_gain": True})))
    with pytest.raises(ConfigError, match="the same run"):
        plan_trials(twice, "demo", ["algorithm.dvpo_loss_weights.ablate_gain=true"], [0])
    assert load_config("demo").algorithm.dvpo_loss_weights.ablate_gain is False
