"""Requests to stop, with roles in memory: what is saved, and that nothing is done twice or lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvpo_service.host.stopping import Stopped, Stopping, check
from dvpo_service.loop import Roles, TrainState, train
from dvpo_service.runs.checkpoint import Checkpoints
from tests.builders import make_config
from tests.fakes import Log
from tests.test_loop import make_roles

TRAINER = {"num_steps": 4, "eval_every": 2, "save_every": 0}
CONFIG = make_config("model", trainer=TRAINER)


def after(stage: Callable[..., Any], step: int, act: Callable[[], object]) -> Callable[..., Any]:
    """Return ``stage`` changed to call ``act`` at its end in one step, as when a request comes at that point."""

    def wrapped(*args: Any) -> Any:
        result = stage(*args)
        if args[-1] == step:
            act()
        return result

    return wrapped


def stopped_run(folder: Path, role: str, method: str, step: int, stopping: Stopping) -> tuple[Roles, Stopped]:
    """Train, and send a real signal at the end of ``method`` in one step; return the roles and the Stopped raised."""
    roles = make_roles(Log())
    part = getattr(roles, role)
    setattr(part, method, after(getattr(part, method), step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with stopping.listening(), pytest.raises(Stopped) as stopped:
        train(CONFIG, roles, Checkpoints(folder, keep=2), TrainState(), stopping)
    return roles, stopped.value


@pytest.mark.parametrize(
    ("role", "method", "saved"),
    [
        ("stream", "next", 2),  # the trainers are unchanged: stops at once
        ("policy", "logprobs_async", 2),
        ("estimator", "advantages", 3),  # the critic has changed: stops after the step
        ("estimator", "update_async", 3),
        ("evaluator", "run", 2),
    ],
)
def test_a_checkpoint_of_a_boundary_and_a_run_that_continues_as_if_nothing_was(
    tmp_path: Path, role: str, method: str, saved: int
) -> None:
    lines: list[str] = []
    roles, stopped = stopped_run(tmp_path, role, method, 2, Stopping(lines.append))
    assert str(stopped) == f"stopping: checkpoint at step {saved} written; the same command continues"
    assert stopped.exit_code == 143
    assert lines[-1] == f"stopping: writing the checkpoint of step {saved}"
    assert len(lines) == (1 if method in ("next", "logprobs_async") else 2)
    assert sorted(roles.tracker.rows) == list(range(saved + 1)), "what the checkpoint holds has been logged"  # type: ignore[attr-defined]

    latest = Checkpoints(tmp_path, keep=2).latest()
    assert latest is not None
    assert latest.record["state"]["step"] == saved
    assert latest.record["stream"] == {"taken": saved}, "the cursor as it was at the boundary"

    whole, rest = Log(), Log()
    train(CONFIG, make_roles(whole), Checkpoints(tmp_path / "whole", keep=2), TrainState())
    again = make_roles(rest)
    again.stream.load_state_dict(latest.record["stream"])
    train(CONFIG, again, Checkpoints(tmp_path, keep=2), TrainState(**latest.record["state"]))
    assert rest.calls[1:] == whole.calls[-len(rest.calls) + 1 :]
    assert sorted(again.tracker.rows) == list(range(saved + 1, 5))  # type: ignore[attr-defined]


def test_a_wait_at_a_boundary_is_cut_short(tmp_path: Path) -> None:
    """A call reaches all ranks and engines before the run stops; only the waiting for its result is cut short."""
    log = Log()
    waits = Stopping()
    roles = make_roles(log)

    def generating(step: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        log("asked")
        for _ in range(1000):
            check()
        raise AssertionError("the wait went on")

    roles.stream.next = generating  # type: ignore[method-assign]
    with waits.listening(), pytest.raises(Stopped, match="checkpoint at step 0 written"):
        train(CONFIG, roles, Checkpoints(tmp_path, keep=2), TrainState(), waits)
    assert log.names()[-1] == "asked"
    check()  # raises nothing: no Stopping listens any more


def test_what_ray_makes_of_an_exception_in_its_depths_is_still_a_stop() -> None:
    waits = Stopping()
    waits.requested = signal.SIGTERM
    with pytest.raises(Stopped, match="interrupted") as stopped, waits.listening():
        raise SystemError("returned a result with an exception set")
    assert stopped.value.exit_code == 143
    with pytest.raises(SystemError), Stopping().listening():
        raise SystemError("of another cause")


def test_before_the_first_step_the_evaluation_is_not_done_again(tmp_path: Path) -> None:
    stopped_run(tmp_path, "stream", "next", 0, Stopping())
    latest = Checkpoints(tmp_path, keep=2).latest()
    assert latest is not None
    log = Log()
    train(CONFIG, make_roles(log), Checkpoints(tmp_path, keep=2), TrainState(**latest.record["state"]))
    assert log.names()[:2] == ["push", "generate"]


def test_before_training_there_is_nothing_to_save(tmp_path: Path) -> None:
    _, stopped = stopped_run(tmp_path, "evaluator", "run", 0, Stopping())
    assert "the same command continues from the last checkpoint" in str(stopped)
    assert Checkpoints(tmp_path, keep=2).latest() is None


def test_a_request_in_the_last_step_ends_after_its_checkpoint(tmp_path: Path) -> None:
    _, stopped = stopped_run(tmp_path, "estimator", "advantages", 3, Stopping())
    assert "the last step is saved" in str(stopped)
    latest = Checkpoints(tmp_path, keep=2).latest()
    assert latest is not None
    assert latest.record["state"]["step"] == 4


def test_a_second_request_ends_at_once_without_a_checkpoint(tmp_path: Path) -> None:
    roles = make_roles(Log())
    stopping = Stopping()

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    roles.estimator.advantages = after(roles.estimator.advantages, 2, twice)  # type: ignore[method-assign]
    with stopping.listening(), pytest.raises(Stopped, match="stopped at once") as stopped:
        train(CONFIG, roles, Checkpoints(tmp_path, keep=2), TrainState(), stopping)
    assert stopped.value.exit_code == 130
    assert Checkpoints(tmp_path, keep=2).latest() is None


def test_a_second_request_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    roles = make_roles(Log())
    stopping = Stopping()
    config = make_config("model", trainer=TRAINER | {"save_every": 2})
    roles.stream.next = after(roles.stream.next, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))  # type: ignore[method-assign]
    save = roles.policy.save

    def slow(folder: Path) -> Any:
        if "000003" in str(folder):
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder)

    roles.policy.save = slow  # type: ignore[method-assign]
    with stopping.listening(), pytest.raises(Stopped, match="stopped at once"):
        train(config, roles, Checkpoints(tmp_path, keep=2), TrainState(), stopping)
    latest = Checkpoints(tmp_path, keep=2).latest()
    assert latest is not None
    assert latest.record["state"]["step"] == 2


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    roles = make_roles(Log())
    stopping = Stopping()
    saves = []
    config = make_config("model", trainer=TRAINER | {"save_every": 1})
    save = roles.policy.save
    roles.policy.save = lambda folder: saves.append(folder) or save(folder)  # type: ignore[method-assign, func-returns-value]
    roles.stream.next = after(roles.stream.next, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))  # type: ignore[method-assign]
    with stopping.listening(), pytest.raises(Stopped, match="checkpoint at step 2 written"):
        train(config, roles, Checkpoints(tmp_path, keep=2), TrainState(), stopping)
    assert len(saves) == 2


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with Stopping().listening() as stopping:
        assert signal.getsignal(signal.SIGTERM) == stopping.request
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
