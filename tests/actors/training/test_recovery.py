"""The loop recovers from the loss of trainer groups, with roles in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.cluster.pool import PoolError, RestartBudgetExhausted
from actors.cluster.supervisor import restart_budget
from actors.training.recovery import GroupRestarts
from dvpo_service import loop
from dvpo_service.commands.assemble import recovery_of
from dvpo_service.host.failure import describe
from dvpo_service.runs.checkpoint import Checkpoints
from tests.builders import make_config
from tests.fakes import DoneJob, Log
from tests.test_loop import make_roles

TRAINER = {"num_steps": 6, "save_every": 2, "eval_every": 3}


def lost(pool: str) -> PoolError:
    return PoolError(pool, "update", "an actor died", lost=True)


@dataclass
class FakeGroup:
    """A group that counts its builds. ``broken``: errors of the next builds. ``dead``: why its ranks are lost."""

    built: int = 0
    broken: list[PoolError] = field(default_factory=list)
    dead: str | None = None

    def rebuild(self) -> Any:
        self.built += 1
        self.dead = None
        error = self.broken.pop(0) if self.broken else None
        return FakeCall(error)

    def gone(self) -> str | None:
        return self.dead


@dataclass
class FakeCall:
    """A call that is finished the second time it is looked at."""

    error: PoolError | None
    timeout_s: float = 60.0
    looks: int = 0

    def finished(self, within_s: float) -> bool:
        self.looks += 1
        return self.looks > 1

    def result(self) -> None:
        if self.error:
            raise self.error


@dataclass
class Run:
    """A run whose policy update of step s raises ``faults[s]``, once."""

    tmp_path: Path
    faults: dict[int, PoolError]
    max_restarts: int = 3
    log: Log = field(default_factory=Log)
    notes: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.roles = make_roles(self.log)
        self.checkpoints = Checkpoints(self.tmp_path, keep=2)
        self.groups = {"policy": FakeGroup(), "critic": FakeGroup()}
        update = self.roles.policy.update_async

        def failing(rollouts: Any, advantages: Any, step: int) -> DoneJob:
            if step in self.faults:
                raise self.faults.pop(step)
            return update(rollouts, advantages, step)  # type: ignore[return-value]

        self.roles.policy.update_async = failing  # type: ignore[method-assign]
        cluster = {"max_restarts": self.max_restarts, "restart_backoff_s": 1.0}
        self.config = make_config("model", cluster=cluster, trainer=TRAINER)
        restarts = GroupRestarts(list(self.groups), restart_budget(self.config.cluster))
        self.roles.health = restarts.metrics
        pools: Any = SimpleNamespace(trainers=self.groups, restarts=restarts)
        self.recovery = recovery_of(self.config, self.roles, pools, self.checkpoints, self.notes.append)
        self.recovery.wait = self.waits.append

    def train(self) -> loop.TrainState:
        state = loop.TrainState()
        for attempt in self.recovery.attempts(state):
            with attempt:
                state = loop.train(self.config, self.roles, self.checkpoints, attempt.state)
        return state


def test_a_lost_group_goes_back_to_the_checkpoint_and_the_run_ends_as_if_nothing_was(tmp_path: Path) -> None:
    calm = Run(tmp_path / "calm", {})
    run = Run(tmp_path / "faulty", {3: lost("policy")})
    calm.train()
    state = run.train()
    assert state.step == 6
    rows: Any = [r.tracker.rows for r in (calm.roles, run.roles)]
    assert [sorted(r) for r in rows] == [list(range(7))] * 2
    repairs = ("time/", "pool/")
    assert [{k: v for k, v in r.items() if not k.startswith(repairs)} for r in rows[0].values()] == [
        {k: v for k, v in r.items() if not k.startswith(repairs)} for r in rows[1].values()
    ]
    assert run.roles.stream.taken == calm.roles.stream.taken == 6, "the cursor went back too"  # type: ignore[attr-defined]
    assert [c[1] for c in run.log.calls if c[0] == "generate"] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert [c[1] for c in run.log.calls if c[0] == "push"] == [0, 1, 2, 3, 2, 3, 4, 5, 6], "the engines go back first"
    assert run.groups["policy"].built == 1
    assert run.groups["critic"].built == 0, "its live ranks load the checkpoint"
    assert rows[1][6]["pool/restarts/policy"] == 1
    assert [step for step, row in rows[1].items() if "pool/recovery_s/policy" in row] == [3], "told once"
    assert "policy lost a rank" in run.notes[0]
    assert "(1 of 3)" in run.notes[0]


def test_without_a_checkpoint_everything_is_built_again_from_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path, {1: lost("critic")})
    assert run.train().step == 6
    assert (run.groups["policy"].built, run.groups["critic"].built) == (1, 1)
    assert [c[1] for c in run.log.calls if c[0] == "generate"] == [0, 1, 0, 1, 2, 3, 4, 5]


def test_a_rank_that_dies_while_it_starts_is_tried_again_after_a_longer_wait(tmp_path: Path) -> None:
    run = Run(tmp_path, {3: lost("policy")})
    run.groups["policy"].broken = [lost("policy"), lost("critic")]
    assert run.train().step == 6
    assert run.groups["critic"].built == 1, "lost during the recovery, so built too"
    assert [round(w) for w in run.waits] == [1, 2, 1]


def test_a_group_that_is_lost_beside_another_is_noticed_while_that_one_starts(tmp_path: Path) -> None:
    run = Run(tmp_path, {3: lost("critic")})
    run.groups["policy"].dead = "an actor died"
    assert run.train().step == 6
    assert (run.groups["policy"].built, run.groups["critic"].built) == (1, 1), "both at once, neither twice"
    assert "critic and policy restarted" in run.notes[-1]
    assert [step for step, row in run.roles.tracker.rows.items() if "pool/recovery_s/policy" in row] == [3]  # type: ignore[attr-defined]


def test_a_spent_budget_is_one_line_with_the_cause_and_the_command(tmp_path: Path) -> None:
    run = Run(tmp_path, {s: lost("policy") for s in (1, 2, 3)}, max_restarts=2)
    with pytest.raises(RestartBudgetExhausted) as caught:
        run.train()
    line, code = describe(caught.value)
    assert code == 2
    assert "\n" not in line
    for words in ("'policy'", "2 restarts", "an actor died", f"--run-dir {tmp_path}"):
        assert words in line


@pytest.mark.parametrize(
    "error",
    [PoolError("policy", "update", "TypeError: a mistake in the code"), lost("rollout")],
    ids=["not lost", "no trainer"],
)
def test_what_a_restart_cannot_mend_is_raised(tmp_path: Path, error: PoolError) -> None:
    run = Run(tmp_path, {1: error})
    with pytest.raises(PoolError) as caught:
        run.train()
    assert caught.value is error
    assert run.groups["policy"].built == 0
