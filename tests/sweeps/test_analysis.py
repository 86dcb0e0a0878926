"""The analysis of a sweep's records: hand-computed pairs, and incomplete records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dvpo_service.eval_stats import mean_interval
from tests.sweeps.synthetic import random_sweep, save_grid, save_trial
from tune_sweeps.analysis import Analysis, analyse, find_columns
from tune_sweeps.comparison import by_chance, interval, judge
from tune_sweeps.grid import GRIDS, Arm, Grid
from tune_sweeps.guide import GuideRow, guide_rows, own_losses
from tune_sweeps.records import read_sweep

TWO = Grid("two", "Two arms", (Arm("base", {}), Arm("other", {"trainer.num_steps": 3})), reference="base")


def pairs(folder: Path, base: list[float | None], other: list[float | None], **before: float) -> Analysis:
    """Return the analysis of two arms on one split. Each number is the accuracy of one seed after training."""
    save_grid(folder, TWO, range(len(base)))
    for arm, values in (("base", base), ("other", other)):
        for seed, value in enumerate(values):
            save_trial(folder, arm, seed, after={"val": value}, before=before or {"val": 0.4})
    return analyse(read_sweep(folder))


def test_paired_differences(tmp_path: Path) -> None:
    analysis = pairs(tmp_path, [0.50, 0.60, 0.70], [0.52, 0.61, 0.76])
    (comparison,) = analysis.accuracy
    assert comparison.by_seed == pytest.approx({0: 0.02, 1: 0.01, 2: 0.06})
    assert comparison.mean == pytest.approx(0.03)
    assert (comparison.reference_mean, comparison.arm_mean) == pytest.approx((0.60, 0.63))
    assert (comparison.low, comparison.high) == pytest.approx((-0.03572, 0.09572), abs=1e-5)  # t(2) = 4.303
    assert (comparison.verdict, comparison.reason) == ("the seeds cannot tell", "the interval contains 0")
    level = analysis.arms[1].levels["in"]
    assert level.change == pytest.approx(0.23)
    assert level.sd == pytest.approx(0.12124, abs=1e-4)  # of 0.52, 0.61, 0.76 with n - 1
    assert (level.worst, level.worst_seed) == (0.52, 0)


@pytest.mark.parametrize(
    ("other", "verdict", "reason"),
    [
        ([0.4, 0.35, 0.38], "lower", "all 3 seeds agree"),
        ([0.4, 0.6, 0.45], "the seeds cannot tell", "sign"),
        ([0.5, 0.5, 0.5], "the seeds cannot tell", "no difference"),
        ([0.9, None, 0.9], "the seeds cannot tell", "2 pairs"),
    ],
)
def test_verdicts(tmp_path: Path, other: list[float | None], verdict: str, reason: str) -> None:
    (comparison,) = pairs(tmp_path, [0.5, 0.5, 0.5], other).accuracy
    assert comparison.verdict == verdict
    assert reason in comparison.reason


def test_an_interval_that_holds_zero_says_nothing() -> None:
    assert judge([0.1, 0.2, 0.3], -0.01, 0.3) == ("the seeds cannot tell", "the interval contains 0")


def test_interval_needs_three_pairs_and_takes_equal_ones() -> None:
    assert interval([0.1, 0.2]) == (None, None)
    assert interval([0.1, 0.1, 0.1]) == pytest.approx((0.1, 0.1))
    assert interval([0.1 * i for i in range(11)]) == pytest.approx((0.2772, 0.7228), abs=1e-4)
    assert interval([0.0, 1.0, 2.0]) == pytest.approx(mean_interval([0.0, 1.0, 2.0])), "one function with dvpo eval"


@pytest.mark.parametrize("n", [3, 5])
def test_verdicts_by_chance_are_no_more_than_a_simulation_finds(n: int) -> None:
    import numpy as np

    drawn = np.random.default_rng(0).standard_normal((1200, n)).tolist()
    verdicts = [judge(row, *interval(row))[0] for row in drawn]
    share = sum(v != "the seeds cannot tell" for v in verdicts) / len(verdicts)
    assert 0.02 < share <= 0.05 + 3 * (0.05 * 0.95 / 1200) ** 0.5


def test_by_chance_counts_only_what_has_an_interval(tmp_path: Path) -> None:
    analysis = pairs(tmp_path, [0.5] * 3, [0.6, 0.4, 0.5])
    assert by_chance(analysis.accuracy) == pytest.approx(0.05)
    assert by_chance([replace(analysis.accuracy[0], low=None, high=None)]) == 0


def test_one_seed_has_no_spread_and_no_interval(tmp_path: Path) -> None:
    analysis = pairs(tmp_path, [0.5], [0.7])
    assert analysis.accuracy[0].mean == pytest.approx(0.2)
    assert analysis.accuracy[0].low is None
    assert analysis.accuracy[0].verdict == "the seeds cannot tell"
    assert analysis.arms[0].levels["in"].sd is None


def test_trials_that_did_not_finish_are_counted_and_enter_no_mean(tmp_path: Path) -> None:
    save_grid(tmp_path, TWO, range(4))
    for seed in range(4):
        save_trial(tmp_path, "base", seed, after={"val": 0.5})
    save_trial(tmp_path, "other", 0, after={"val": 0.6})
    # The folder may have the summary of an earlier attempt; a failed trial has no result all the same.
    save_trial(tmp_path, "other", 1, after={"val": 0.9}, status="failed", error="no memory")
    save_trial(tmp_path, "other", 2, rows=[{"step": 0, "eval/val/accuracy": 0.4}], status="running")
    analysis = analyse(read_sweep(tmp_path))
    assert analysis.arms[1].status == {"done": 1, "failed": 1, "unfinished": 1, "not begun": 1}
    assert analysis.accuracy[0].by_seed == pytest.approx({0: 0.1})
    assert analysis.arms[1].collapsed == {1: "failed"}


def test_no_reference_compares_nothing(tmp_path: Path) -> None:
    for name, reference in (("none", None), ("unknown", "gone")):
        sweep = random_sweep(tmp_path / name, replace(GRIDS["forms"], reference=reference), seeds=(0, 1))
        analysis = analyse(read_sweep(sweep.folder))
        assert analysis.reference is None
        assert analysis.accuracy == []
        assert analysis.arms[0].levels["in"].after is not None
        assert guide_rows(read_sweep(sweep.folder), analysis) == []


def test_reference_without_a_trial(tmp_path: Path) -> None:
    save_grid(tmp_path, TWO, (0,))
    save_trial(tmp_path, "other", 0, after={"val": 0.6})
    (comparison,) = analyse(read_sweep(tmp_path)).accuracy
    assert (comparison.by_seed, comparison.mean) == ({}, None)
    assert comparison.verdict == "the seeds cannot tell"


@pytest.mark.parametrize(
    ("splits", "columns"),
    [
        (["ood"], [("in", ("ood",))]),
        (["id", "ood"], [("in", ("id",)), ("ood", ("ood",))]),
        (["easy", "hard"], [("in", ("easy", "hard"))]),
        (["held_out", "out_of_range"], [("in", ("held_out",)), ("ood", ("out_of_range",))]),
        (["layout", "ood-long"], [("in", ("layout",)), ("ood", ("ood-long",))]),
    ],
)
def test_which_splits_are_out_of_distribution(tmp_path: Path, splits: list[str], columns: list[Any]) -> None:
    save_grid(tmp_path, TWO, (0,))
    save_trial(tmp_path, "base", 0, after=dict.fromkeys(splits, 0.5))
    assert [(c.key, c.splits) for c in find_columns(read_sweep(tmp_path))] == columns


def test_several_splits_are_one_number_only_when_all_were_measured(tmp_path: Path) -> None:
    save_grid(tmp_path, TWO, (0, 1))
    save_trial(tmp_path, "base", 0, after={"a": 0.2, "b": 0.4})
    save_trial(tmp_path, "base", 1, after={"a": 0.2, "b": None})
    assert analyse(read_sweep(tmp_path)).arms[0].levels["in"].by_seed == pytest.approx({0: 0.3})


def test_collapse(tmp_path: Path) -> None:
    save_grid(tmp_path, TWO, range(4))
    save_trial(tmp_path, "base", 0, before={"val": 0.50}, after={"val": 0.47})  # 3 below its start
    save_trial(tmp_path, "base", 1, before={"val": 0.50}, after={"val": 0.49})  # within 2
    for seed, best in ((2, 0.66), (3, 0.64)):
        rows = [{"step": i, "eval/val/accuracy": v} for i, v in enumerate((0.5, best, None, 0.6))]
        save_trial(tmp_path, "base", seed, before={"val": 0.50}, after={"val": 0.6}, rows=rows)
    collapsed = analyse(read_sweep(tmp_path)).arms[0].collapsed
    assert list(collapsed) == [0, 2]
    assert "3.0 points below its start" in collapsed[0]
    assert "6.0 points below its best" in collapsed[2]


def test_skipped_steps_and_warnings_by_name(tmp_path: Path) -> None:
    save_grid(tmp_path, TWO, (0, 1))
    rows = [{"step": 1, "policy/skipped_steps": 1.0, "critic/skipped_steps": 2.0}, {"step": 2}]
    warnings = ["step 3 [heads_disagree] a", "step 9 [heads_disagree] [b]", "no name"]
    save_trial(tmp_path, "base", 0, after={"val": 0.5}, rows=rows, warnings=warnings)
    save_trial(tmp_path, "base", 1, rows=rows, status="failed")
    arm = analyse(read_sweep(tmp_path)).arms[0]
    assert arm.skipped_steps == 6
    assert arm.warnings == {"heads_disagree": 2, "other": 1}


def rows_of(folder: Path, **how: Any) -> dict[str, GuideRow]:
    random_sweep(folder, seeds=range(3), **how)
    sweep = read_sweep(folder)
    return {row.term: row for row in guide_rows(sweep, analyse(sweep))}


def test_guide_shows_what_was_put_into_the_numbers(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    shown = {term for term, row in rows.items() if row.shown == "shown"}
    assert shown == {"cvar", "gain", "shift", "shape", "curv", "consist"}
    assert rows["risk"].shown == "not tested"
    assert "no noise" in rows["risk"].why
    sweep = read_sweep(tmp_path)
    losses = own_losses(sweep, analyse(sweep))
    assert [x.term for x in losses] == ["risk", "cvar", "gain", "shift", "shape", "curv", "consist"]
    assert all(x.comparison.verdict == "higher" for x in losses)


def test_risk_is_tested_where_rewards_are_noisy(tmp_path: Path) -> None:
    assert rows_of(tmp_path, noise=0.2)["risk"].comparison.low is not None


def test_guide_without_a_critic_or_an_ood_split(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, critic=False, splits=("val",))
    assert {t for t, r in rows.items() if r.shown == "not tested"} == set(rows) - {"gain"}
    assert "no split out of distribution" in rows["gain"].expected.diagnostic


def test_diagnostics_by_hand(tmp_path: Path) -> None:
    """Ten updates: the critic's bias is 0.2 at steps 3 and 4 and -0.1 at steps 9 and 10. A null is left out."""
    grid = Grid("g", "g", (Arm("full", {}), Arm("no-shift", {}, "shift"), Arm("no-cvar", {}, "cvar")), "full")
    save_grid(tmp_path, grid, (0,))
    bias = [0.0, 0.0, 0.2, 0.2, 0, 0, 0, 0, -0.1, -0.1]
    tail = [9.0, 5.0, 1.0, 2.0, None, 7.0, 9.0, 9.0, 9.0, 9.0]
    rows = [
        {"step": i + 1, "critic/quantile_mean": 0.5 + b, "critic/return_mean": 0.5, "critic/lower_tail_mean": t}
        for i, (b, t) in enumerate(zip(bias, tail, strict=True))
    ]
    for arm in grid.arms:
        save_trial(tmp_path, arm.name, 0, after={"val": 0.5}, rows=rows)
    sweep = read_sweep(tmp_path)
    means = {row.term: row.comparison.arm_mean for row in guide_rows(sweep, analyse(sweep))}
    assert means["shift"] == pytest.approx(-0.1)
    # Changes 1 -> 2, 7 -> 9, and three of 0: sd of 1, 2, 0, 0, 0.
    assert means["cvar"] == pytest.approx(0.8944, abs=1e-4)


def test_shift_has_to_underestimate(tmp_path: Path) -> None:
    """The predictions are lower than the reference's but above the returns, so there is no underestimation."""
    grid = Grid("g", "g", (Arm("full", {}), Arm("no-shift", {}, "shift")), reference="full")
    save_grid(tmp_path, grid, range(3))
    for arm, bias in (("full", 0.3), ("no-shift", 0.1)):
        for seed in range(3):
            rows = [{"step": 1, "critic/quantile_mean": 0.5 + bias + 0.01 * seed, "critic/return_mean": 0.5}]
            save_trial(tmp_path, arm, seed, after={"val": 0.5}, rows=rows)
    sweep = read_sweep(tmp_path)
    (row,) = guide_rows(sweep, analyse(sweep))
    assert row.comparison.verdict == "lower"
    assert row.shown == "not shown"
