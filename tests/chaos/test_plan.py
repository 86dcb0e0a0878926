"""The plan of faults and the report on them, without a run."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.builders import needs
from tests.chaos.events import Events
from tests.chaos.faults import KINDS, NAN, NAN_GAP, Fault, counts, draw_plan, read_plan, write_plan
from tests.chaos.harness import Harness
from tests.chaos.machines import SmallDisk, corrupt_newest
from tests.chaos.report import accuracy_check, engine_overheads, fault_checks, outcomes, overhead_check, table


@pytest.mark.parametrize("total", [5, 20, 37, 100, 250])
def test_counts_add_up_and_no_kind_is_left_out_where_there_is_room(total: int) -> None:
    given = counts(total)
    assert sum(given.values()) == total
    assert all(n >= 1 for n in given.values())
    assert len(given) == min(total, len(KINDS))


def test_half_of_a_hundred_faults_end_a_process_or_take_something_away() -> None:
    given = counts(100)
    assert sum(n for name, n in given.items() if not KINDS[name].repeats and name != "mlflow") >= 46


def test_a_kind_that_is_skipped_is_made_up_for_by_the_others() -> None:
    given = counts(100, skip=("checkpoint",))
    assert "checkpoint" not in given
    assert sum(given.values()) == 100


def test_a_plan_is_the_seed_s_alone_and_keeps_its_distances(tmp_path: Path) -> None:
    plan = draw_plan(counts(100), 120, seed=3)
    assert plan == draw_plan(counts(100), 120, seed=3)
    assert plan != draw_plan(counts(100), 120, seed=4)
    assert Counter(f.kind for f in plan) == counts(100)
    assert [f.id for f in plan] == list(range(100))
    assert all(f.at in KINDS[f.kind].at or not KINDS[f.kind].at for f in plan)
    nan = sorted(f.step for f in plan if f.kind in NAN)
    assert all(b - a >= NAN_GAP for a, b in itertools.pairwise(nan)), "three in a row would end the run"
    write_plan(plan, tmp_path / "plan.jsonl")
    assert read_plan(tmp_path / "plan.jsonl") == plan


def test_too_few_steps_for_the_faults_are_an_error() -> None:
    with pytest.raises(ValueError, match="too few"):
        draw_plan(counts(100), 20, seed=0)


def struck(id: int, kind: str, time: float, number: int = 0) -> dict[str, Any]:
    return {
        **{"event": "struck", "id": id, "kind": kind, "time": time, "number": number},
        **{"step": id, "stage": "", "victim": kind},
    }


def of(event: str, time: float, pool: str = "rollout", number: int = 0, **more: Any) -> dict[str, Any]:
    return {"event": event, "time": time, "pool": pool, "number": number} | more


def test_losses_and_recoveries_belong_to_the_victim_that_was_struck() -> None:
    events = [
        struck(0, "engine", 10.0, number=1),
        of("lost", 10.5, number=0),
        of("lost", 11.0, number=1),
        of("back", 20.0, number=0),
        of("back", 31.0, number=1),
    ]
    [fault] = outcomes(events, {})
    assert (fault.noticed_s, fault.recovered_s, fault.limit_s) == (1.0, 21.0, 15.0)


def test_a_new_driver_is_a_recovery_of_what_the_old_one_had_not_noticed() -> None:
    events = [
        struck(0, "policy", 10.0),
        struck(1, "driver", 10.1),
        {"event": "ready", "time": 40.0},
        of("lost", 90.0, "policy"),
        {"event": "over", "id": 1, "time": 45.0},
    ]
    rank, driver = outcomes(events, {})
    assert (rank.noticed_s, rank.recovered_s) == (None, 30.0)
    assert driver.recovered_s == pytest.approx(34.9)
    assert all(c.ok for c in fault_checks([rank, driver], [0, 1], 2))


def test_a_node_s_losses_are_noticed_first_and_recovered_last() -> None:
    events = [
        struck(0, "node", 10.0),
        of("lost", 12.0, number=1),
        of("lost", 14.0, "critic"),
        of("back", 40.0, "critic"),
        of("back", 50.0, number=1),
    ]
    [fault] = outcomes(events, {})
    assert (fault.noticed_s, fault.recovered_s) == (2.0, 40.0)


def test_what_was_missed_late_or_stuck_fails() -> None:
    events = [
        struck(0, "hang", 10.0),
        of("lost", 50.0),
        of("back", 70.0),
        struck(1, "reward-nan", 80.0),
        struck(2, "engine", 90.0),
        of("lost", 91.0),
    ]
    faults = outcomes(events, {"hang": 30.0})
    checks = {c.name: c for c in fault_checks(faults, [0, 1, 2, 3], 3)}
    assert checks["3 faults or more"].ok
    assert checks["every planned fault struck"].detail == "missing: [3]"
    assert checks["noticed in time"].detail == "0 hang (step 0), 1 reward-nan (step 1)"
    assert checks["recovered"].detail == "1 reward-nan (step 1), 2 engine (step 2)"
    assert not any(c.ok for name, c in checks.items() if name != "3 faults or more")
    assert "| SIGSTOP of an EngineCore, generating | 1 | 40.0 s | 40.0 s | 60.0 s | 60.0 s |" in table(faults)


def test_an_engine_that_was_still_starting_when_the_run_finished_is_no_failure() -> None:
    events = [struck(0, "engine", 10.0), of("lost", 11.0), {"event": "end", "time": 20.0, "code": 0}]
    faults = outcomes(events, {})
    assert faults[0].outrun
    assert all(c.ok for c in fault_checks(faults, [0], 1))
    assert not outcomes([*events[:2], {"event": "end", "time": 20.0, "code": 1}], {})[0].outrun


def test_an_engine_s_recovery_is_held_against_its_own_start() -> None:
    one = [of("lost", 0.0), of("starting", 1.0), of("started", 21.0), of("back", 23.0)]
    assert engine_overheads(one) == [(23.0, 20.0, False)]
    assert overhead_check(engine_overheads(one)).ok
    slow = [of("lost", 0.0), of("starting", 1.0), of("started", 21.0), of("back", 35.0)]
    assert not overhead_check(engine_overheads(slow)).ok
    # The weights came late because the group of ranks that sends them was restarting: not the engine's fault.
    held_up = [*slow[:2], of("lost", 5.0, "policy"), *slow[2:]]
    assert engine_overheads(held_up) == [(35.0, 20.0, True)]
    assert not overhead_check(engine_overheads(held_up)).ok, "then none was measured"
    # Or another engine hung in the push of those weights.
    peer = {**of("lost", 30.0), "number": 1, "cause": "no heartbeat within 15 s"}
    assert engine_overheads([*slow[:3], peer, slow[3]]) == [(35.0, 20.0, True)]


def test_accuracy_may_differ_by_noise_only() -> None:
    assert accuracy_check(0.60, 0.55, 300).ok
    assert not accuracy_check(0.60, 0.40, 300).ok


def test_a_corrupted_checkpoint_differs_and_the_one_before_does_not(tmp_path: Path) -> None:
    for step in (4, 8):
        folder = tmp_path / f"step-{step:06d}" / "policy"
        folder.mkdir(parents=True)
        (folder / "shard.safetensors").write_bytes(bytes(1000))
        (folder.parent / "state.json").write_text("{}")
    assert corrupt_newest(tmp_path).name == "step-000008"
    assert (tmp_path / "step-000004/policy/shard.safetensors").read_bytes() == bytes(1000)
    changed = (tmp_path / "step-000008/policy/shard.safetensors").read_bytes()
    assert len(changed) == 1000
    assert sum(b != 0 for b in changed) == 64


@needs(None if os.geteuid() == 0 else "a tmpfs needs root")
def test_a_small_disk_is_full_and_then_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmallDisk(tmp_path / "disk", 8) as disk:
        disk.fill(leave=2**20)
        with pytest.raises(OSError, match="space") as met:
            (disk.folder / "large").write_bytes(bytes(2 * 2**20))
        assert met.value.errno == errno.ENOSPC
        disk.empty()
        (disk.folder / "large").write_bytes(bytes(2 * 2**20))
        usage = shutil.disk_usage
        more = [usage(disk.folder)._replace(free=2**30)]  # the free space before a save takes it
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: more.pop() if more else usage(folder))
        disk.fill(leave=2**20)
        assert 0 < usage(disk.folder).free <= 2**20, "a save that is faster does not end the suite"
        (disk.folder / "large").unlink()  # a save that was under way ends, and prunes
        assert usage(disk.folder).free > 2**20
        disk.fill(leave=2**20)
        assert 0 < usage(disk.folder).free <= 2**20, "what it freed is taken too"
        (disk.folder / "large").touch()
    assert not (tmp_path / "disk" / "large").exists(), "it went with the disk"


def test_the_disk_stays_full_until_a_save_has_met_it() -> None:
    """A save under way prunes a checkpoint when it ends; its room must not be there for the next save."""
    free, fills, written = [10], [], []

    def fill(leave: int) -> None:
        fills.append(free[-1])
        free.append(10 if len(fills) == 2 else 0)  # after the second time, the save that was under way prunes

    harness: Any = object.__new__(Harness)
    harness.disk = SimpleNamespace(fill=fill, empty=lambda: free.append(-1))
    harness.terminal = SimpleNamespace(read_bytes=lambda: b"error: the disk is full" if written else b"")
    harness.events = SimpleNamespace(write=lambda name, **what: written.append(name))
    harness.restarted = []
    harness._struck = lambda fault, words: None
    harness._look = lambda began: None
    harness._running = lambda: not written

    def noted(words: str, fault: Fault) -> bool:
        """Return whether a save has met the full disk: the next one comes after the pruning."""
        if len(fills) < 3 or free[-1] > 0:
            return False
        written.append("met")
        return True

    harness._was_noted = noted
    harness._disk(Fault(7, "disk", 3))
    assert fills[:3] == [10, 0, 10], "it was filled again after the pruning"
    assert written[-1] == "seen"
    assert free[-1] == -1, "and is empty in the end"


def test_events_are_read_by_name(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    assert events.read() == []
    events.write("ready", pid=1)
    events.write("step", step=3)
    assert [e["step"] for e in events.read("step")] == [3]
    assert len(events.read()) == 2
