"""The kinds of faults, and a plan of faults drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

DEAD_S = 15.0  # within which a dead process is noticed


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
      what: the fault, in words.
      share: how many of about a hundred faults are of this kind.
      at: stages of a step in which it may strike; empty if the harness causes it from outside.
      pool: the pool that it strikes.
      repeats: it belongs to its step, and strikes again when that step is repeated; other faults strike once.
    """

    what: str
    share: int
    at: tuple[str, ...] = ()
    pool: str = ""
    repeats: bool = False


KINDS: dict[str, Kind] = {
    "engine-idle": Kind("SIGKILL of a rollout engine, idle", 6, ("update",), "rollout"),
    "engine": Kind("SIGKILL of a rollout engine, generating", 6, ("generate",), "rollout"),
    "core": Kind("SIGKILL of an EngineCore, generating", 6, ("generate",), "rollout"),
    "hang": Kind("SIGSTOP of an EngineCore, generating", 4, ("generate",), "rollout"),
    "policy": Kind("SIGKILL of a policy rank", 5, ("logprobs", "update", "push"), "policy"),
    "critic": Kind("SIGKILL of a critic rank", 5, ("advantages", "update"), "critic"),
    "reward-worker": Kind("SIGKILL of a reward worker, about to score or idle", 6, ("score", "update"), "reward"),
    "nan-policy": Kind("NaN in a policy rank's loss", 6, ("update",), "policy", repeats=True),
    "nan-critic": Kind("NaN in a critic rank's loss", 6, ("update",), "critic", repeats=True),
    "reward-raise": Kind("reward function raises", 8, ("score",), repeats=True),
    "reward-nan": Kind("reward function returns NaN", 8, ("score",), repeats=True),
    "reward-none": Kind("reward function returns None", 8, ("score",), repeats=True),
    "reward-text": Kind("reward function returns a string", 7, ("score",), repeats=True),
    "reward-memory": Kind("reward function eats memory", 4, ("score",), repeats=True),
    "reward-hang": Kind("reward function hangs", 4, ("score",), repeats=True),
    "mlflow": Kind("SIGKILL of the MLflow server, back after some steps", 4),
    "driver": Kind("SIGKILL of the driver", 3),
    "node": Kind("a worker node's processes all killed, another node added", 3),
    "disk": Kind("disk full while saving", 2),
    "checkpoint": Kind("newest checkpoint corrupted, driver killed", 2),
}
NAN = ("nan-policy", "nan-critic")
NAN_GAP = 2  # steps between NaN faults: a few bad steps in a row end a run, as they should
EARLIEST, LATEST = 2, 6  # steps at the start, and before the end, that have no faults


@dataclass(frozen=True)
class Fault:
    """A fault that strikes ``after_s`` into stage ``at`` of ``step``. ``number`` chooses the victim."""

    id: int
    kind: str
    step: int
    at: str = ""
    number: int = 0
    after_s: float = 0.0


def counts(total: int, skip: tuple[str, ...] = ()) -> dict[str, int]:
    """Return how many of ``total`` faults are of each kind: by their shares, and at least one of each if possible."""
    kinds = {name: kind.share for name, kind in KINDS.items() if name not in skip}
    if total <= len(kinds):
        rare_first = sorted(kinds, key=lambda name: kinds[name])
        return {name: 1 for name in rare_first[:total]}
    left = total - len(kinds)
    all_shares = sum(kinds.values())
    exact = {name: left * share / all_shares for name, share in kinds.items()}
    given = {name: int(x) for name, x in exact.items()}
    by_rest = sorted(exact, key=lambda name: exact[name] - given[name], reverse=True)
    for name in by_rest[: left - sum(given.values())]:
        given[name] += 1
    return {name: 1 + given[name] for name in kinds}


def draw_plan(wanted: Mapping[str, int], steps: int, seed: int) -> list[Fault]:
    """Return faults in the order of their steps. Each kind has one fault in each of equal parts of the run."""
    rng = random.Random(seed)
    drawn = list[tuple[int, str]]()
    nan_steps = list[int]()
    for name, count in wanted.items():
        # The loss of an engine and the faults of the harness take many steps to recover from.
        slow = not KINDS[name].at or KINDS[name].pool == "rollout"
        first, last = EARLIEST, steps - (max(2 * LATEST, steps // 8) if slow else LATEST)
        if last - first < count:
            raise ValueError(f"{steps} steps are too few for {count} faults of kind {name}")
        for i in range(count):
            low, high = first + (last - first) * i // count, first + (last - first) * (i + 1) // count
            free = [s for s in range(low, high) if name not in NAN or all(abs(s - n) >= NAN_GAP for n in nan_steps)]
            if not free:
                raise ValueError(f"{steps} steps are too few for NaN faults {NAN_GAP} steps apart")
            step = rng.choice(free)
            drawn.append((step, name))
            if name in NAN:
                nan_steps.append(step)
    rng.shuffle(drawn)
    return [
        Fault(
            id,
            name,
            step,
            rng.choice(KINDS[name].at) if KINDS[name].at else "",
            rng.randrange(10_000),
            round(rng.uniform(0.03, 0.2), 3),
        )
        for id, (step, name) in enumerate(sorted(drawn, key=lambda d: d[0]))
    ]


def write_plan(plan: list[Fault], file: Path) -> None:
    file.write_text("".join(json.dumps(asdict(f)) + "\n" for f in plan))


def read_plan(file: Path) -> list[Fault]:
    return [Fault(**json.loads(line)) for line in file.read_text().splitlines()]
