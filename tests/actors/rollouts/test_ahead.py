"""The stream that generates ahead, with engines in memory: the age limit, order, the ledger, faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cluster.pool import PoolError
from actors.rollouts.ahead import AheadStream
from dvpo_service.data.dataset import Dataset
from dvpo_service.types import Prompt, Sample
from tests.actors.rollouts.test_stream import FakeLedger, FakeRewards
from tests.builders import make_config

WAIT_S = 20.0
PROMPTS, PER_STEP = 10, 4  # an epoch ends in the middle of a batch


class Engines:
    """Engines that sample with the version they hold when asked. While ``gate`` is not set, ``generate`` waits."""

    def __init__(self) -> None:
        self.version = 0
        self.asked = list[tuple[int, int]]()
        self.revived = 0
        self.gate = threading.Event()
        self.waiting = threading.Event()
        self.gate.set()
        self.fail: dict[int, Exception] = {}

    def generate(
        self, prompts: list[Prompt], sampling: Any, *, run_seed: int, step: int, check: Callable[[], None]
    ) -> list[list[Sample]]:
        version = self.version
        self.asked.append((step, version))
        while not self.gate.wait(0.01):
            self.waiting.set()
            check()
        if step in self.fail:
            raise self.fail.pop(step)
        return [[Sample(p.index, j, (5,), (-1.0,), "x", "stop", version) for j in range(4)] for p in prompts]

    def revive(self) -> bool:
        self.revived += 1
        return True


Make = Callable[..., AheadStream]


@pytest.fixture
def make(tiny_model: Path) -> Iterator[Make]:
    streams: list[AheadStream] = []

    def stream(max_staleness: int = 1, steps: int = 30, **rollout: Any) -> AheadStream:
        rollout = {"prompts_per_step": PER_STEP, "n": 4, "max_staleness": max_staleness} | rollout
        rows = tuple(Prompt(i, ({"role": "user", "content": "?"},), str(i), "test", (7, 8)) for i in range(PROMPTS))
        config = make_config(tiny_model, rollout=rollout, trainer={"num_steps": steps})
        data = Dataset("test", rows, ("",) * PROMPTS)
        new = AheadStream(config, data, Engines(), FakeRewards(), FakeLedger())  # type: ignore[arg-type]
        streams.append(new)
        return new

    yield stream
    for each in streams:
        each.engines.gate.set()  # type: ignore[attr-defined]
        each.close()


def engines_of(stream: AheadStream) -> Engines:
    return stream.engines  # type: ignore[return-value]


def used(stream: AheadStream) -> list[int]:
    return [i for _, prompts, _ in stream.ledger.used for i in prompts]  # type: ignore[attr-defined]


def epochs_are_whole(indices: list[int]) -> bool:
    parts = [indices[i : i + PROMPTS] for i in range(0, len(indices), PROMPTS)]
    return all(len(set(p)) == len(p) for p in parts)


@pytest.mark.parametrize("bound", [1, 2, 5])
def test_a_batch_is_made_before_its_step_and_never_earlier_than_the_bound_allows(make: Make, bound: int) -> None:
    stream = make(bound)
    stale = []
    for step in range(30):
        engines_of(stream).version = step  # as the loop pushes it
        batch = stream.next(step)
        stale.append(batch.metrics["rollout/staleness"])
        assert int((step - batch.rollouts.weight_version).max()) <= bound
    asked = engines_of(stream).asked
    assert [step for step, _ in asked] == list(range(30)), "in order, none beyond the last step"
    assert all(step - version <= bound for step, version in asked)
    assert max(stale) >= 1, "it did run ahead"
    assert epochs_are_whole(used(stream))


def test_the_next_batch_is_under_way_while_the_trainers_work(make: Make) -> None:
    stream = make(1)
    stream.next(0)
    assert stream._ahead.keys() == {1}
    stream._ahead[1].result(WAIT_S)  # it was generated before anyone asked for it


def test_a_checkpoint_knows_of_what_was_given_only(make: Make) -> None:
    stream = make(3)
    start = stream.state_dict()
    stream.next(0)
    for future in list(stream._ahead.values()):
        future.result(WAIT_S)
    assert start["offset"] == 0
    assert stream.state_dict()["offset"] == PER_STEP
    assert stream.cursor.state_dict() != stream.state_dict(), "the cursor is ahead"


def test_going_back_uses_what_was_made_and_repeats_no_prompt(make: Make) -> None:
    stream = make(2)
    first = {}
    states = {}
    for step in range(6):
        engines_of(stream).version = step
        states[step] = stream.state_dict()
        first[step] = stream.next(step).rollouts.prompt_index.tolist()
    asked = len(engines_of(stream).asked)
    stream.load_state_dict(states[3])
    for step in range(3, 6):
        engines_of(stream).version = step
        batch = stream.next(step)
        assert batch.rollouts.prompt_index.tolist() == first[step]
        assert batch.metrics["rollout/reused"] == len(batch.rollouts)
    assert [s for s, _ in engines_of(stream).asked[asked:]] in ([], [6], [7], [6, 7]), "nothing given was made anew"


def test_after_a_batch_made_anew_later_ones_are_not_those_of_the_lost_run(make: Make) -> None:
    stream = make(1, reuse_gib=0.0)
    start = stream.state_dict()
    for step in range(3):
        engines_of(stream).version = step
        stream.next(step)
    stream.load_state_dict(start)
    engines_of(stream).version = 0
    assert stream.next(0).metrics["rollout/reused"] == 0
    assert not [s for s in stream.cache.batches if s > 1]


def test_an_error_is_the_loops_at_the_step_that_it_belongs_to(make: Make) -> None:
    stream = make(1)
    engines_of(stream).fail[1] = PoolError("rollout", "generate", "no engine can", lost=False)
    stream.next(0)
    state = stream.state_dict()
    with pytest.raises(PoolError, match="no engine can"):
        stream.next(1)
    stream.load_state_dict(state)
    assert stream.next(1).rollouts.prompt_index.tolist(), "and a second try is possible"
    assert epochs_are_whole([*used(stream)])


def test_going_back_does_not_wait_for_a_batch_that_nobody_wants(make: Make) -> None:
    stream = make(1)
    start = stream.state_dict()
    stream.next(0)
    stream._ahead[1].result(WAIT_S)
    engines_of(stream).gate.clear()
    stream.next(1)
    assert engines_of(stream).waiting.wait(WAIT_S), "the batch of step 2 waits"
    stream.load_state_dict(start)
    assert not stream._ahead
    engines_of(stream).gate.set()
    assert stream.next(0).metrics["rollout/reused"] == 16


def test_while_the_loop_waits_it_looks_after_the_engines(make: Make) -> None:
    stream = make(1)
    engines_of(stream).gate.clear()
    threading.Timer(1.0, engines_of(stream).gate.set).start()
    batch = stream.next(0)
    assert engines_of(stream).revived >= 1, "they may all be new, and without weights"
    assert batch.metrics["time/wait"] > 0.5


def test_tokens_older_than_the_bound_are_never_given(make: Make) -> None:
    stream = make(1)
    stream.next(0)
    stream._ahead[1].result(WAIT_S)
    engines_of(stream).version = 0  # the engines missed every push
    stream.next(1)
    stream._ahead[2].result(WAIT_S)
    with pytest.raises(RuntimeError, match="older than max_staleness"):
        stream.next(2)


@settings(max_examples=15, deadline=None)
@given(
    bound=st.integers(1, 4),
    backs=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=4),
    memory=st.sampled_from([0.0, 1.0]),
    dynamic=st.booleans(),
)
def test_whatever_is_done_again_the_ledger_is_exact(
    tiny_model: Path, bound: int, backs: list[tuple[int, int]], memory: float, dynamic: bool
) -> None:
    rows = tuple(Prompt(i, ({"role": "user", "content": "?"},), str(i), "test", (7, 8)) for i in range(PROMPTS))
    rollout = {"prompts_per_step": PER_STEP, "n": 4, "max_staleness": bound, "reuse_gib": memory}
    config = make_config(tiny_model, rollout=rollout | {"dynamic_sampling": dynamic}, trainer={"num_steps": 12})
    stream = AheadStream(config, Dataset("test", rows, ("",) * PROMPTS), Engines(), FakeRewards(), FakeLedger())  # type: ignore[arg-type]
    states = {}
    ledger = dict[int, list[int]]()
    step = 0
    back = {at: to for at, to in backs if to <= at}
    while step < 12:
        states[step] = stream.state_dict()
        if step in back:
            step = back.pop(step)
            stream.load_state_dict(states[step])
        engines_of(stream).version = step
        batch = stream.next(step)
        assert int((step - batch.rollouts.weight_version).max()) <= bound
        ledger[step] = stream.ledger.used[-1][1]  # type: ignore[attr-defined]
        step += 1
    stream.close()
    assert sorted(ledger) == list(range(12))
    assert epochs_are_whole([i for s in range(12) for i in ledger[s]])


def test_a_batch_that_does_not_end_is_named_and_keeps_nothing_alive(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stream, never = make(1), threading.Event()
    stream._stop_s = 0.2
    stream._ahead[4] = stream._thread.submit(never.wait)
    assert not never.wait(0.2)
    with pytest.raises(RuntimeError, match=r"the batch of step 5 did not stop within 0\.2 s: an engine or a reward"):
        stream.load_state_dict(stream.state_dict())
    stream.close()
    assert "did not stop within 0.2 s" in caplog.text
    [thread] = [t for t in threading.enumerate() if t.name == "rollouts ahead" and t.is_alive()][-1:]
    assert thread.daemon, "the process can end"
    never.set()
