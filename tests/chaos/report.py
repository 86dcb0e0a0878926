"""What became of each fault, and whether the run kept its promises: pure functions of the events."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.faults import DEAD_S, KINDS

HUNG = "no heartbeat"  # how the supervisor words the cause of a lost engine
OWN_OVERHEAD_S = 10.0  # an engine's recovery may take this much longer than its start
NODE_LOSSES_S = 20.0  # losses within this time after a node's death are caused by it
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
      noticed_s, recovered_s: seconds from the strike; None if it was not noticed, or the run did not recover from it.
      limit_s: time within which it must be noticed.
      outrun: the run finished before it had recovered, e.g. while an engine was starting and another one served.
    """

    id: int
    kind: str
    step: int
    stage: str
    victim: str
    time: float
    noticed_s: float | None
    recovered_s: float | None
    limit_s: float | None
    outrun: bool = False


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


def outcomes(events: Sequence[Row], deadlines: Mapping[str, float]) -> list[Outcome]:
    """Return the outcome of each fault that struck.

    Args:
      deadlines: limits in seconds, for the kinds that are noticed by a timeout and not by a death.
    """
    return [_outcome(e, events, deadlines) for e in events if e["event"] == "struck"]


def _outcome(fault: Row, events: Sequence[Row], deadlines: Mapping[str, float]) -> Outcome:
    after = [e for e in events if e["time"] >= fault["time"]]
    kind = fault["kind"]
    pool = KINDS[kind].pool
    ready = _first(after, lambda e: e["event"] == "ready")  # a new driver has everything running
    seen: float | None
    if KINDS[kind].at and pool and not kind.startswith("nan"):
        number = fault["number"] if pool in ("rollout", "reward") else 0  # a group of ranks is lost as one

        def of_victim(e: Row, name: str) -> bool:
            return e["event"] == name and e["pool"] == pool and e["number"] == number

        seen = _first(after, lambda e: of_victim(e, "lost"))
        over = _least(_first([e for e in after if seen and e["time"] > seen], lambda e: of_victim(e, "back")), ready)
        if seen and ready and ready < seen:
            seen = None  # the driver was lost before it noticed
    elif kind == "node":
        near = [e for e in after if e["event"] == "lost" and e["time"] < fault["time"] + NODE_LOSSES_S]
        seen = min((e["time"] for e in near), default=None)
        backs = [
            _first(
                after,
                lambda e, w=who: (
                    e["event"] == "back" and (e["pool"], e["number"]) == w and (not seen or e["time"] > seen)
                ),
            )
            for who in {(e["pool"], e["number"]) for e in near}
        ]
        over = _least(ready, None if None in backs or not backs else max(b for b in backs if b))
    else:
        seen = _first(after, lambda e: e["event"] == "seen" and e["id"] == fault["id"])
        over = _first(after, lambda e: e["event"] == "over" and e["id"] == fault["id"])
    since = fault["time"]
    return Outcome(
        *(fault["id"], kind, fault["step"], fault["stage"], fault["victim"], since),
        None if seen is None else seen - since,
        None if over is None else over - since,
        deadlines.get(kind, DEAD_S if pool and KINDS[kind].at and not kind.startswith("nan") else None),
        outrun=over is None and seen is not None and any(e["event"] == "end" and e["code"] == 0 for e in after),
    )


def _first(events: Sequence[Row], matches: Any) -> float | None:
    return next((e["time"] for e in events if matches(e)), None)


def _least(*times: float | None) -> float | None:
    return min((t for t in times if t is not None), default=None)


def engine_overheads(events: Sequence[Row]) -> list[tuple[float, float, bool]]:
    """Return (recovery, start, held up) for each engine that was lost and came back, in seconds.

    Held up means that the push of weights that the engine waited for came late: trainers were lost in between, or
    another engine hung, perhaps in that push.
    """
    overheads = []
    for i, lost in enumerate(events):
        if lost["event"] != "lost" or lost["pool"] != "rollout":
            continue
        began = started = None
        held_up = False
        for e in events[i + 1 :]:
            if e["event"] in ("ready", "end"):
                break
            held_up |= e["event"] == "lost" and (e["pool"] != "rollout" or HUNG in e["cause"])
            if e.get("pool") != "rollout" or e.get("number") != lost["number"]:
                continue
            if e["event"] == "lost":
                break  # it died again; that is another recovery
            began = e["time"] if e["event"] == "starting" else began
            started = e["time"] if e["event"] == "started" else started
            if e["event"] == "back":
                if began and started:
                    overheads.append((e["time"] - lost["time"], started - began, held_up))
                break
    return overheads


def fault_checks(faults: Sequence[Outcome], planned: Sequence[int], wanted: int) -> list[Check]:
    """Check that enough faults struck, and that each was noticed in time and recovered from."""
    missing = sorted(set(planned) - {o.id for o in faults})
    late = [o for o in faults if o.limit_s and o.noticed_s is not None and o.noticed_s > o.limit_s]
    # A fault may be hidden by another one, e.g. if the driver is killed first; then it must have recovered.
    unseen = [o for o in faults if o.noticed_s is None and o.kind != "driver"]
    unseen = [o for o in unseen if o.recovered_s is None or not KINDS[o.kind].pool or KINDS[o.kind].repeats]
    stuck = [o for o in faults if o.recovered_s is None and not o.outrun]
    outrun = [o for o in faults if o.outrun]
    return [
        Check(f"{wanted} faults or more", len(faults) >= wanted, f"{len(faults)} struck"),
        Check("every planned fault struck", not missing, f"missing: {missing}" if missing else f"all {len(planned)}"),
        Check("noticed in time", not late and not unseen, _names([*late, *unseen]) or "each within its limit"),
        Check("recovered", not stuck, _names(stuck) or f"each, but for what the run's end came before: {len(outrun)}"),
    ]


def overhead_check(overheads: Sequence[tuple[float, float, bool]]) -> Check:
    """Check that no engine, unless it was held up, took much longer to recover than to start."""
    alone = [(whole, start) for whole, start, held_up in overheads if not held_up]
    over = [f"{whole:.0f} s against {start:.0f} s" for whole, start in alone if whole > start + OWN_OVERHEAD_S]
    name = f"an engine recovers within its own start + {OWN_OVERHEAD_S:g} s"
    if not overheads:
        return Check(name, True, "no engine was struck")
    if not alone:
        return Check(name, False, "no engine recovered")
    wholes = [whole for whole, _ in alone]
    starts = [start for _, start in alone]
    detail = (
        f"{len(alone)} recoveries, median {statistics.median(wholes):.1f} s (start {statistics.median(starts):.1f} s)"
    )
    return Check(name, not over, detail + (f"; over: {', '.join(over)}" if over else ""))


def accuracy_check(calm: float, faulty: float, prompts: int) -> Check:
    """Check that the accuracies differ by at most three standard deviations of the difference of two shares."""
    mean = (calm + faulty) / 2
    noise = 3 * math.sqrt(2 * mean * (1 - mean) / prompts)
    detail = f"calm {calm:.3f}, with faults {faulty:.3f}; noise {noise:.3f} ({prompts} prompts, 3 sd)"
    return Check("held-out accuracy within noise of the calm run", abs(calm - faulty) <= noise, detail)


def table(faults: Sequence[Outcome]) -> str:
    """Return a Markdown table with a row for each kind of fault."""
    lines = [
        "| fault | count | noticed, median | max | recovered, median | max |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in KINDS.items():
        of_kind = [o for o in faults if o.kind == name]
        if of_kind:
            cells = [f"{kind.what}", f"{len(of_kind)}"]
            for values in ([o.noticed_s for o in of_kind], [o.recovered_s for o in of_kind]):
                known = [v for v in values if v is not None]
                cells += [f"{statistics.median(known):.1f} s", f"{max(known):.1f} s"] if known else ["-", "-"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(folder: Path, faults: Sequence[Outcome], checks: Sequence[Check], facts: Mapping[str, Any]) -> None:
    """Write ``report.json`` and ``report.md``."""
    tree = {"facts": facts, "checks": [asdict(c) for c in checks], "faults": [asdict(o) for o in faults]}
    (folder / "report.json").write_text(json.dumps(tree, indent=1) + "\n")
    listed = "\n".join(f"- {'ok' if c.ok else '**FAILED**'}: {c.name}: {c.detail}" for c in checks)
    fact_lines = "\n".join(f"- {k}: {v}" for k, v in facts.items())
    (folder / "report.md").write_text(f"{table(faults)}\n\n{listed}\n\n{fact_lines}\n")


def _names(faults: Sequence[Outcome]) -> str:
    return ", ".join(f"{o.id} {o.kind} (step {o.step})" for o in faults)
