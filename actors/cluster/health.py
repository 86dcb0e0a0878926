"""Health of a pool's actors as a pure state machine: no Ray, no threads, no clock inside.

    starting --started--> stale --acknowledged--> serving      weights moved on: serving -> stale
    any --died--> dead --restarted--> starting                 drained: any -> draining -> dead for good

An actor serves only while it holds the weights of ``Fleet.version``. Times are seconds of any
clock that does not go back, given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

State = Literal["starting", "stale", "serving", "draining", "dead"]
Event = Literal["started", "acknowledged", "outdated", "drained", "died", "restarted"]

# The weights of the model folder, before any push.
FOLDER_VERSION = -1

_NEXT: dict[tuple[State, Event], State] = {
    ("starting", "started"): "stale",
    ("stale", "acknowledged"): "serving",
    ("serving", "acknowledged"): "serving",
    ("serving", "outdated"): "stale",
    ("starting", "drained"): "draining",
    ("stale", "drained"): "draining",
    ("serving", "drained"): "draining",
    ("starting", "died"): "dead",
    ("stale", "died"): "dead",
    ("serving", "died"): "dead",
    ("draining", "died"): "dead",
    ("dead", "restarted"): "starting",
}


def after(state: State, event: Event) -> State:
    """The state that ``event`` leads to. Raises ValueError for one that cannot happen in ``state``."""
    if (state, event) not in _NEXT:
        raise ValueError(f"an actor that is {state} cannot have {event}")
    return _NEXT[state, event]


@dataclass(frozen=True)
class Budget:
    """At most ``max_restarts`` restarts of a pool's actors within ``window_s``: a month's run may see many
    faults, a broken one sees them close together. The k-th death in a row of an actor waits
    ``backoff_s * 2**(k - 1)``, at most ``backoff_max_s``."""

    max_restarts: int
    window_s: float
    backoff_s: float
    backoff_max_s: float

    def delay(self, deaths: int) -> float:
        return min(self.backoff_max_s, self.backoff_s * 2.0 ** min(deaths - 1, 30))


@dataclass(frozen=True)
class Member:
    """One actor. ``version``: of the weights that it holds. ``due``: when to start it again, or None for never."""

    state: State = "starting"
    version: int = FOLDER_VERSION
    deaths: int = 0  # since it last served
    died_at: float = 0.0  # time of the first of those deaths
    due: float | None = None
    cause: str = ""


@dataclass
class Fleet:
    """The actors of one pool, by number."""

    size: int
    budget: Budget
    version: int = FOLDER_VERSION
    members: list[Member] = field(default_factory=list)
    restarts: int = 0
    spent: bool = False  # an actor died when no restart was left
    _granted: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = [Member() for _ in range(self.size)]

    def which(self, *states: State) -> list[int]:
        return [i for i, m in enumerate(self.members) if m.state in states]

    def started(self, i: int) -> None:
        """Actor ``i`` runs, with the model folder's weights."""
        self._move(i, "started", version=FOLDER_VERSION)
        if self.version == FOLDER_VERSION:
            self.acknowledged(i, FOLDER_VERSION)

    def advance(self, version: int) -> None:
        """Weights ``version`` are the ones to serve. No actor serves until it has acknowledged them."""
        self.version = version
        for i in self.which("serving"):
            self._move(i, "outdated")

    def acknowledged(self, i: int, version: int) -> None:
        """Actor ``i`` holds weights ``version``. It serves if they are the fleet's, and stays stale otherwise."""
        if version == self.version:
            self._move(i, "acknowledged", version=version, deaths=0)
        else:
            self.members[i] = replace(self.members[i], version=version)

    def drain(self, i: int) -> None:
        """Actor ``i`` gets no further work and is not started again."""
        self._move(i, "drained")

    def died(self, i: int, cause: str, now: float) -> bool:
        """Actor ``i`` died; return whether a restart was granted. ``spent`` is set if not, unless it was drained."""
        before = self.members[i]
        drained = before.state == "draining"
        granted = not drained and self.used(now) < self.budget.max_restarts
        deaths = before.deaths + 1
        self._move(
            i,
            "died",
            cause=cause,
            deaths=deaths,
            died_at=before.died_at if before.deaths else now,
            due=now + self.budget.delay(deaths) if granted else None,
        )
        if granted:
            self._granted.append(now)
            self.restarts += 1
        self.spent |= not granted and not drained
        return granted

    def used(self, now: float) -> int:
        """Restarts granted within the window that ends now."""
        self._granted = [t for t in self._granted if t > now - self.budget.window_s]
        return len(self._granted)

    def due(self, now: float) -> list[int]:
        """The dead whose back-off is over."""
        return [i for i in self.which("dead") if (d := self.members[i].due) is not None and d <= now]

    def restarted(self, i: int) -> None:
        self._move(i, "restarted", due=None, version=FOLDER_VERSION)

    def _move(self, i: int, event: Event, **changes: object) -> None:
        state = after(self.members[i].state, event)
        self.members[i] = replace(self.members[i], state=state, **changes)  # type: ignore[arg-type]
