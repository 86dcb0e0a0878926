"""Recovery from the loss of a trainer rank: its group restarts from the last checkpoint, in the same job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from actors.cluster.health import Budget, Fleet
from actors.cluster.pool import Call, PoolError, RestartBudgetExhausted
from actors.training.rank_pool import RankPool
from dvpo_service.host import stopping
from dvpo_service.loop import TrainState
from dvpo_service.types import Metrics

LOOK_S = 1.0


class GroupRestarts:
    """Counts the restarts of each trainer group against the budget, and measures how long recovery took."""

    def __init__(self, names: Iterator[str] | list[str], budget: Budget):
        self.budget = budget
        self.fleets = {name: Fleet(1, budget) for name in names}
        for fleet in self.fleets.values():
            fleet.started(0)
        self.recovery_s: dict[str, float] = {}

    def metrics(self) -> Metrics:
        """Return the restarts so far of each group and, if one recovered since the last call, how long that took."""
        seconds, self.recovery_s = self.recovery_s, {}
        restarts = {f"pool/restarts/{name}": float(fleet.restarts) for name, fleet in self.fleets.items()}
        return restarts | {f"pool/recovery_s/{name}": s for name, s in seconds.items()}


@dataclass
class Recovery:
    """Brings a run back to its last checkpoint when a trainer group is lost.

    Attributes:
      groups: the trainer pools by name.
      last_checkpoint: finds the last checkpoint. It returns the checkpoint's step, or None without one, and a function
        that brings every role back to it, or to the start.
      restarts: the count of restarts per group.
      note: gets one line for the user at every loss and recovery.
      resume_command: the command that continues the run when no restart is left.
      wait, clock: sleep and monotonic time, for tests.
    """

    groups: Mapping[str, RankPool]
    last_checkpoint: Callable[[], tuple[int | None, Callable[[], TrainState]]]
    restarts: GroupRestarts
    note: Callable[[str], None]
    resume_command: str
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def attempts(self, state: TrainState) -> Iterator[Attempt]:
        """Yield attempts to train until one ends without the loss of a group::

            for attempt in recovery.attempts(state):
                with attempt:
                    state = loop.train(..., attempt.state)

        An attempt raises RestartBudgetExhausted, with the command that continues the run, when a pool's budget is
        spent, and whatever else training raises.
        """
        attempt = Attempt(self, state)
        while not attempt.done:
            yield attempt

    def recover(self, error: PoolError) -> TrainState:
        """Bring both groups back to the last checkpoint, with fresh ranks for the lost groups; return its state.

        Raises:
          RestartBudgetExhausted: no restart is left.
          PoolError: a restart cannot mend the error.
        """
        began = self.clock()
        lost = set[str]()
        while True:
            lost.add(self._grant(error))
            try:
                state = self._restore(lost)
            except PoolError as another:  # the other group, or a rank that died while it started
                error = another
                continue
            for name in lost:
                self.restarts.fleets[name].started(0)
                self.restarts.recovery_s[name] = self.clock() - began
            self.note(f"{' and '.join(sorted(lost))} restarted in {self.clock() - began:.1f} s, at step {state.step}")
            return state

    def _grant(self, error: PoolError) -> str:
        """Wait for the lost group's back-off and return its name. Raise the error if a restart cannot mend it."""
        name = error.pool
        if name not in self.groups or not error.lost:
            raise error
        fleet = self.restarts.fleets[name]
        budget = self.restarts.budget
        now = self.clock()
        if not fleet.died(0, error.cause, now):
            raise RestartBudgetExhausted(name, error.cause, budget.max_restarts) from error
        member = fleet.members[0]
        used = f"{fleet.used(now)} of {budget.max_restarts}"
        self.note(f"{name} lost a rank, in {error.method} ({error.cause[:200]}); restarting its group ({used})")
        self.wait(max(0.0, (member.due or now) - now))
        fleet.restarted(0)
        return name

    def _restore(self, lost: set[str]) -> TrainState:
        step, restore = self.last_checkpoint()
        # Without a checkpoint, the only way back to the start is to build every group again.
        building = {name: g.rebuild() for name, g in self.groups.items() if name in lost or step is None}
        self._watch_others(building, lost)
        for call in building.values():
            call.result()
        return restore()

    def _watch_others(self, building: dict[str, Call], lost: set[str]) -> None:
        """Wait until the groups in ``building`` are built. A group that dies meanwhile is added and built too."""
        began = self.clock()
        while any(not c.finished(LOOK_S) for c in building.values() if self.clock() - began < c.timeout_s):
            stopping.check()
            for name, group in self.groups.items():
                if name not in building and (cause := group.gone()):
                    lost.add(self._grant(PoolError(name, "restart", cause, lost=True)))
                    building[name] = group.rebuild()


@dataclass
class Attempt:
    """One attempt to train from ``state`` to the end.

    When a group is lost in its ``with`` block, leaving the block recovers the run, and another attempt follows.
    """

    recovery: Recovery
    state: TrainState
    done: bool = field(default=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self.done = True
            return False
        try:
            if isinstance(error, PoolError) and not isinstance(error, RestartBudgetExhausted):
                self.state = self.recovery.recover(error)
                return True
        except RestartBudgetExhausted as exhausted:
            exhausted.resume = self.recovery.resume_command
            raise
        if isinstance(error, RestartBudgetExhausted):
            error.resume = self.recovery.resume_command
        return False
