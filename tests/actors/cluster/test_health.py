"""Health and the restart budget as a state machine, under arbitrary histories."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.cluster.health import FOLDER_VERSION, Budget, Fleet, after

BUDGET = Budget(max_restarts=3, window_s=100.0, backoff_s=1.0, backoff_max_s=8.0)


class History(RuleBasedStateMachine):
    """Events of a pool of three actors, in any order, with time passing between them."""

    @initialize()
    def begin(self) -> None:
        self.fleet = Fleet(3, BUDGET)
        self.now = 0.0
        self.granted = list[float]()
        self.states = ["starting"] * 3

    def some(self, data: st.DataObject, *states: str) -> int | None:
        members = self.fleet.which(*states)  # type: ignore[arg-type]
        return data.draw(st.sampled_from(members)) if members else None

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        if (i := self.some(data, "starting")) is not None:
            self.fleet.started(i)

    @rule(version=st.integers(0, 5))
    def push(self, version: int) -> None:
        self.fleet.advance(version)
        assert self.fleet.which("serving") == [], "nobody serves between a push and its acknowledgement"

    @rule(data=st.data(), version=st.integers(-1, 5))
    def acknowledge(self, data: st.DataObject, version: int) -> None:
        if (i := self.some(data, "stale", "serving")) is not None:
            serving = self.fleet.members[i].state == "serving"
            if not serving or version == self.fleet.version:
                self.fleet.acknowledged(i, version)

    @rule(data=st.data(), cause=st.text(max_size=3))
    def die(self, data: st.DataObject, cause: str) -> None:
        if (i := self.some(data, "starting", "stale", "serving", "draining")) is not None:
            drained = self.fleet.members[i].state == "draining"
            if self.fleet.died(i, cause, self.now):
                assert not drained
                self.granted.append(self.now)
            member = self.fleet.members[i]
            assert member.due is None or self.now + BUDGET.backoff_s <= member.due <= self.now + BUDGET.backoff_max_s

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        if (i := self.some(data, "starting", "stale", "serving")) is not None:
            self.fleet.drain(i)

    @precondition(lambda self: self.fleet.due(self.now))
    @rule()
    def restart(self) -> None:
        self.fleet.restarted(self.fleet.due(self.now)[0])

    @invariant()
    def only_current_weights_serve(self) -> None:
        for i in self.fleet.which("serving"):
            assert self.fleet.members[i].version == self.fleet.version

    @invariant()
    def the_dead_come_back_through_starting(self) -> None:
        new = [m.state for m in self.fleet.members]
        assert all(b in ("dead", "starting") for a, b in zip(self.states, new, strict=True) if a == "dead")
        assert all(b in ("draining", "dead") for a, b in zip(self.states, new, strict=True) if a == "draining")
        self.states = list(new)

    @invariant()
    def the_budget_holds_in_every_window(self) -> None:
        for end in self.granted:
            assert sum(end - BUDGET.window_s < t <= end for t in self.granted) <= BUDGET.max_restarts
        assert self.fleet.restarts == len(self.granted)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_a_new_actor_serves_the_folders_weights_only_while_they_are_current() -> None:
    fleet = Fleet(2, BUDGET)
    fleet.started(0)
    assert fleet.which("serving") == [0]
    assert fleet.members[0].version == FOLDER_VERSION
    fleet.advance(0)
    fleet.started(1)
    assert fleet.which("serving") == []
    fleet.acknowledged(1, 0)
    assert fleet.which("serving") == [1]


@given(st.integers(1, 200))
def test_backoff_doubles_up_to_its_bound(deaths: int) -> None:
    assert BUDGET.delay(deaths) == min(8.0, 2.0 ** (deaths - 1))


def test_serving_again_resets_the_backoff() -> None:
    fleet = Fleet(1, BUDGET)
    for now in (0.0, 10.0):
        fleet.died(0, "x", now)
        fleet.restarted(0)
    assert fleet.members[0].deaths == 2
    assert fleet.members[0].died_at == 0.0, "recovery is counted from the first of the deaths"
    fleet.started(0)
    assert fleet.members[0].deaths == 0


def test_a_death_beyond_the_budget_is_for_good() -> None:
    fleet = Fleet(1, Budget(0, 100.0, 1.0, 8.0))
    assert not fleet.died(0, "EngineDeadError", 5.0)
    assert fleet.spent
    assert fleet.due(1e9) == []


def test_events_that_cannot_happen_are_refused() -> None:
    for state, event in (("dead", "started"), ("dead", "acknowledged"), ("starting", "acknowledged")):
        with pytest.raises(ValueError, match=f"{state} cannot have {event}"):
            after(state, event)  # type: ignore[arg-type]
