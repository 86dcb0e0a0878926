"""Checkpoints that are written while the loop goes on, with roles in memory: cut off, failed, lost, resumed."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dvpo_service.errors import CheckpointError
from dvpo_service.loop import Roles, TrainingStopped, TrainState, train
from dvpo_service.runs.checkpoint import Checkpoints
from dvpo_service.runs.integrity import Files
from tests.actors.training.test_recovery import Run, lost
from tests.builders import make_config, sums_of
from tests.fakes import Log
from tests.test_loop import make_roles

CONFIG = make_config("model", trainer={"num_steps": 8, "save_every": 2, "eval_every": 4})


class Killed(BaseException):
    """Stands for SIGKILL of the driver: nothing runs after it."""


@dataclass
class SlowSave:
    """A save that is written once ``done`` has been called ``polls`` times."""

    folder: Path
    text: str
    polls: int
    error: OSError | None = None

    def done(self) -> bool:
        self.polls -= 1
        return self.polls < 0 and bool(self.result())

    def result(self, timeout_s: float | None = None) -> Files:
        if self.error:
            raise self.error
        (self.folder / "weights").write_text(self.text)
        return sums_of(self.folder)


@dataclass
class Slow:
    """Roles whose policy is saved slowly; its weights are the number of updates. Call ``kill_at`` is the last."""

    polls: int = 2
    kill_at: int | None = None  # counted over all roles
    log: Log = field(default_factory=Log)
    steps: int = 0

    def roles(self) -> Roles:
        self.calls = 0
        roles = make_roles(self.log)
        update = roles.policy.update_async

        def updating(rollouts: Any, advantages: Any, step: int) -> Any:
            self.steps += 1
            assert self.steps == step + 1, "an update of weights of another step"
            return update(rollouts, advantages, step)

        roles.policy.update_async = updating  # type: ignore[method-assign]
        roles.policy.save = lambda folder: SlowSave(folder, str(self.steps), self.polls)  # type: ignore[method-assign, assignment, arg-type]
        for role, method in (
            ("stream", "next"),
            ("policy", "logprobs_async"),
            ("policy", "update_async"),
            ("policy", "save"),
            ("weights", "push"),
            ("evaluator", "run"),
        ):
            part = getattr(roles, role)
            setattr(part, method, self._killing(getattr(part, method)))
        return roles

    def _killing(self, call: Any) -> Any:
        def wrapped(*args: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self.kill_at:
                raise Killed
            return call(*args, **named)

        return wrapped


def start(run: Path, slow: Slow) -> tuple[Roles, Checkpoints, TrainState]:
    """Start as `dvpo train` does, from the newest checkpoint if there is one."""
    roles = slow.roles()
    checkpoints = Checkpoints(run, keep=2)
    latest = checkpoints.latest()
    if latest is None:
        slow.steps = 0
        return roles, checkpoints, TrainState()
    slow.steps = int((Path(str(latest.folder)) / "policy" / "weights").read_text())
    assert slow.steps == latest.record["state"]["step"]
    roles.stream.load_state_dict(latest.record["stream"])
    return roles, checkpoints, TrainState(**latest.record["state"])


def folders(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere_and_again_the_run_ends_with_the_same_figures(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    calm = Slow(polls=0)
    roles, checkpoints, state = start(tmp_path / "calm", calm)
    train(CONFIG, roles, checkpoints, state)
    wanted: dict[int, Any] = roles.tracker.rows  # type: ignore[attr-defined]

    rows: dict[int, Any] = {}
    for kill_at in (draw.randint(1, 40), draw.randint(1, 40), draw.randint(1, 40), None):
        slow = Slow(polls=draw.randint(0, 5), kill_at=kill_at)
        roles, checkpoints, state = start(tmp_path / "run", slow)
        done = state.step
        try:
            state = train(CONFIG, roles, checkpoints, state)
        except Killed:
            assert kill_at is not None
        rows = {s: row for s, row in rows.items() if s <= done} | roles.tracker.rows  # type: ignore[attr-defined]
    assert state.step == CONFIG.trainer.num_steps
    assert folders(tmp_path / "run") == ["step-000006", "step-000008"], "two are kept, and nothing torn is left"
    assert sorted(rows) == sorted(wanted)
    for step, row in rows.items():
        assert {k: v for k, v in row.items() if "time/" not in k} == {
            k: v for k, v in wanted[step].items() if "time/" not in k
        }


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_the_one_before_is_the_latest(tmp_path: Path) -> None:
    slow = Slow(polls=3)
    roles, checkpoints, state = start(tmp_path, slow)
    there: list[list[str]] = []
    push = roles.weights.push

    def pushing(version: int) -> None:
        push(version)
        there.append([f.name for f in Checkpoints(tmp_path, keep=2).whole()])

    roles.weights.push = pushing  # type: ignore[method-assign]
    train(CONFIG, roles, checkpoints, state)
    # Begun after step 2, and written at the fourth poll, after the push of step 4.
    assert there[3:6] == [[], [], ["step-000002"]]
    rows: Any = roles.tracker.rows  # type: ignore[attr-defined]
    assert [s for s, row in rows.items() if "time/checkpoint_write" in row] == [4, 6, 8]
    assert folders(tmp_path) == ["step-000006", "step-000008"]


def test_a_save_that_is_not_written_when_the_next_begins_is_waited_for(tmp_path: Path) -> None:
    roles, checkpoints, state = start(tmp_path, Slow(polls=1000))
    train(CONFIG, roles, checkpoints, state)
    assert folders(tmp_path) == ["step-000006", "step-000008"]


def test_a_disk_that_is_full_in_the_background_is_one_line_soon_and_costs_nothing_before(tmp_path: Path) -> None:
    slow = Slow(polls=0)
    roles, checkpoints, state = start(tmp_path, slow)
    save = roles.policy.save
    full = OSError(errno.ENOSPC, "No space left on device")

    def saving(folder: Any) -> Any:
        job: Any = save(folder)
        job.error = full if "000004" in str(folder) else None
        return job

    roles.policy.save = saving  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"step-000004: No space left.*Earlier checkpoints are whole; free some"):
        train(CONFIG, roles, checkpoints, state)
    assert slow.steps == 4, "found before the next update"
    assert folders(tmp_path) == ["step-000002"]


def test_a_run_that_ends_with_an_error_keeps_the_checkpoint_under_way(tmp_path: Path) -> None:
    slow = Slow(polls=1000)
    roles, checkpoints, state = start(tmp_path, slow)

    def observe(step: int) -> None:
        if step == 4:
            raise TrainingStopped("of some cause")

    roles.observer.observe = observe  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped), checkpoints.finish_on_error():
        train(CONFIG, roles, checkpoints, state)
    assert folders(tmp_path) == ["step-000002"]


def test_a_rank_that_is_lost_during_a_save_takes_the_torn_checkpoint_with_it(tmp_path: Path) -> None:
    run = Run(tmp_path, {5: lost("policy")})
    whole = run.roles.policy.save
    slowly = iter([0, 1000, 0, 0])
    asked: list[str] = []

    def saving(folder: Any) -> Any:
        asked.append(str(folder))
        polls = next(slowly)
        return SlowSave(folder, "policy", polls) if polls else whole(folder)

    run.roles.policy.save = saving  # type: ignore[method-assign]
    assert run.train().step == 6
    assert [c[1] for c in run.log.calls if c[0] == "generate"] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5], "back to step 2"
    assert folders(tmp_path) == ["step-000004", "step-000006"]
    assert len(asked) == 4
