"""Training through the loss of a trainer rank: its group restarts from the last checkpoint, in the same job."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actors.health import Budget, Fleet
from actors.pool import Call, PoolError, RankPool, RestartsSpent
from actors.supervisor import restart_budget
from dvpo_service import stopping
from dvpo_service.checkpoint import Checkpoint, Checkpoints
from dvpo_service.config import Config
from dvpo_service.loop import Roles, TrainState
from dvpo_service.types import Metrics

LOOK_S = 1.0


@dataclass
class Recovery:
    """Runs ``train`` (the loop) to its end, however often a trainer group is lost on the way.

    ``groups`` are the trainer pools by name. ``back()`` finds the last checkpoint: its step, or None,
    and a function that brings every role back to it, or to the start. ``wait`` sleeps, for tests.
    """

    groups: Mapping[str, RankPool]
    back: Callable[[], tuple[int | None, Callable[[], TrainState]]]
    budget: Budget
    note: Callable[[str], None]
    resume_command: str
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    fleets: dict[str, Fleet] = field(default_factory=dict)
    recovery_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: Config,
        roles: Roles,
        groups: Mapping[str, RankPool],
        checkpoints: Checkpoints,
        restore: Callable[[Checkpoint | None], TrainState],
        note: Callable[[str], None],
    ) -> Recovery:
        """For a run that is about to begin: ``restore`` brings trainers and stream to a checkpoint. The roles'
        ``health`` counts the groups' restarts from now on."""
        start = roles.stream.state_dict()

        def back() -> tuple[int | None, Callable[[], TrainState]]:
            found = checkpoints.latest()

            def again() -> TrainState:
                if found is None:
                    roles.stream.load_state_dict(start)
                state = restore(found)
                roles.tracker.rewind(state.step + 1 if found else 0)
                return state

            return found.record["state"]["step"] if found else None, again

        place = checkpoints.folder.parent
        command = f"dvpo train --config {checkpoints.run_dir / 'config.yaml'} --run-dir {place}"
        recovery, others = cls(groups, back, restart_budget(config.cluster), note, command), roles.health
        roles.health = lambda: others() | recovery.metrics()
        return recovery

    def __post_init__(self) -> None:
        self.fleets = {name: Fleet(1, self.budget) for name in self.groups}
        for fleet in self.fleets.values():
            fleet.started(0)

    def run(self, train: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
        """Raises RestartsSpent, with the command that continues the run, when a pool's budget is spent."""
        while True:
            try:
                return train(state)
            except RestartsSpent as error:
                error.resume = self.resume_command
                raise
            except PoolError as error:
                state = self._recover(error)

    def metrics(self) -> Metrics:
        """Restarts so far of each group and, once, how long the last recovery took."""
        seconds, self.recovery_s = self.recovery_s, {}
        found = {f"pool/restarts/{name}": float(fleet.restarts) for name, fleet in self.fleets.items()}
        return found | {f"pool/recovery_s/{name}": s for name, s in seconds.items()}

    def _recover(self, error: PoolError) -> TrainState:
        """Both groups at the last checkpoint again, fresh ranks for what was lost."""
        began, lost = self.clock(), set[str]()
        while True:
            lost.add(self._grant(error))
            try:
                state = self._restore(lost)
            except PoolError as another:  # the other group, or a rank that died while it started
                error = another
                continue
            for name in lost:
                self.fleets[name].started(0)
                self.recovery_s[name] = self.clock() - began
            self.note(f"{' and '.join(sorted(lost))} restarted in {self.clock() - began:.1f} s, at step {state.step}")
            return state

    def _grant(self, error: PoolError) -> str:
        """The name of the lost group, after its back-off. Raises the error if restarting cannot mend it."""
        name = error.pool
        if name not in self.groups or not error.lost:
            raise error
        fleet, now = self.fleets[name], self.clock()
        granted = fleet.died(0, error.cause, now)
        if not granted:
            spent = RestartsSpent(name, error.cause, self.budget.max_restarts)
            spent.resume = self.resume_command
            raise spent from error
        member = fleet.members[0]
        used = f"{fleet.used(now)} of {self.budget.max_restarts}"
        self.note(f"{name} lost a rank, in {error.method} ({error.cause[:200]}); restarting its group ({used})")
        self.wait(max(0.0, (member.due or now) - now))
        fleet.restarted(0)
        return name

    def _restore(self, lost: set[str]) -> TrainState:
        step, restore = self.back()
        # Without a checkpoint there is no other way to the start than to build everything again.
        building = {name: g.rebuild() for name, g in self.groups.items() if name in lost or step is None}
        self._watch_others(building, lost)
        for call in building.values():
            call.result()
        return restore()

    def _watch_others(self, building: dict[str, Call], lost: set[str]) -> None:
        """Until those are built: what dies of the others meanwhile is noticed, and built beside them."""
        began = self.clock()
        while any(not c.finished(LOOK_S) for c in building.values() if self.clock() - began < c.timeout_s):
            stopping.check()
            for name, group in self.groups.items():
                if name not in building and (cause := group.gone()):
                    lost.add(self._grant(PoolError(name, "restart", cause, lost=True)))
                    building[name] = group.rebuild()
