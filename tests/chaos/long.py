"""A hundred faults in one training run, and whether it kept its promises: ``make chaos``.

First comes a calm run, which is kept in the folder for the next time. Then the same run gets faults, by a plan drawn
from ``--seed``. This process owns what a run depends on: a Ray cluster of several nodes on this machine, an MLflow
server, a small disk for the run directory, and the driver, which it restarts with the same command whenever it ends.
It writes ``report.md`` and ``report.json`` into the folder, and exits with status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.chaos.events import Events
from tests.chaos.faults import DEAD_S, KINDS, counts, draw_plan, write_plan
from tests.chaos.harness import Harness
from tests.chaos.machines import SmallDisk
from tests.chaos.report import engine_overheads, fault_checks, outcomes, overhead_check, table, write_report
from tests.chaos.settings import WARMSTART, shipped_prompts, small_config, write_config
from tests.chaos.verdict import calm_rows, run_checks
from tests.e2e.raycluster import RayCluster
from tests.tracking.server import MlflowServer

PROMPTS, PER_STEP = 1000, 32
DISK_MIB = 256
HEARTBEAT_S, REWARD_S = 15.0, 2.0


def config(model: dict[str, Any], folder: Path, steps: int, mlflow: str | None) -> dict[str, Any]:
    """Return the config of both runs; ``mlflow`` is the tracking URI, if any."""
    optim = {"policy": {"lr": 2e-4, "warmup_steps": 10}, "critic": {"lr": 5e-4}}
    base = small_config(model, shipped_prompts(folder, PROMPTS))
    return small_config(
        model,
        shipped_prompts(folder, PROMPTS),
        rollout={
            "prompts_per_step": PER_STEP,
            "n": 8,
            "max_new_tokens": 8,
            "heartbeat_timeout_s": HEARTBEAT_S,
            "generate_timeout_s": 60,
            "sync_timeout_s": 60,
            "start_timeout_s": 240,
        },
        reward={
            "function": "tests.chaos.rewards:exact",
            "num_workers": 2,
            "timeout_s": REWARD_S,
            "max_memory_gib": 0.5,
        },
        algorithm={"form": "calibrated", "n_quantiles": 20, "critic_hidden_dim": 32},
        policy={**base["policy"], "optim": optim["policy"], "step_timeout_s": 120},
        critic={**base["critic"], "optim": optim["critic"], "step_timeout_s": 120},
        trainer={"num_steps": steps, "eval_every": steps // 2, "save_every": 4},
        tracking={"mlflow_uri": mlflow} if mlflow else {},
        # Large enough for all faults: the restart budget is not under test.
        cluster={"restart_backoff_s": 0.5, "restart_backoff_max_s": 5, "max_restarts": 1000},
    )


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.long", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--steps", type=int, help="training steps; by default two for each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument(
        "--skip", default="", help=f"kinds of faults to leave out, separated by commas: {', '.join(KINDS)}"
    )
    given = parser.parse_args(arguments)
    given.out = given.out.absolute()
    given.steps = given.steps or max(60, given.faults * 2)
    given.skip = tuple(filter(None, given.skip.split(",")))
    unknown = set(given.skip) - KINDS.keys()
    if unknown:
        parser.error(f"--skip: no kind {', '.join(unknown)}")
    if "disk" not in given.skip and os.geteuid() != 0:
        parser.error("a small disk can be made by root only; leave that fault out: --skip disk")
    return given


def main(arguments: list[str]) -> int:
    given = options(arguments)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            signum, lambda number, frame: sys.exit(128 + number)
        )  # so that the exit stack ends what was started
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    model = {"warmstart": WARMSTART}
    calm = calm_rows(given.out, given.steps, lambda: config(model, given.out, given.steps, None))
    base = {"path": str(next((given.out / "base-models").glob("base-*")))}

    work = given.out / time.strftime("faulty-%Y%m%d-%H%M%S")
    work.mkdir()
    plan = draw_plan(counts(given.faults, given.skip), given.steps, given.seed)
    write_plan(plan, work / "plan.jsonl")
    events = Events(work / "events.jsonl")
    with ExitStack() as stack:
        mlflow = stack.enter_context(MlflowServer(work / "mlflow"))
        disk = stack.enter_context(SmallDisk(work / "disk", None if "disk" in given.skip else DISK_MIB))
        cluster = stack.enter_context(RayCluster(variables={"RAY_process_group_cleanup_enabled": "1"}))
        tree = config(base, given.out, given.steps, mlflow.uri)
        file = write_config(work / "chaos.yaml", tree)
        harness = Harness(file, disk.folder / "run", plan, events, cluster, mlflow, disk, given.steps)
        harness.start_cluster()
        harness.run()
        checks = run_checks(harness, calm, PROMPTS, given.steps)
    checks += harness.after_cluster()
    faults = outcomes(events.read(), {"hang": HEARTBEAT_S + DEAD_S, "reward-hang": REWARD_S + DEAD_S})
    checks += fault_checks(faults, [f.id for f in plan], given.faults)
    checks.append(overhead_check(engine_overheads(events.read())))
    facts = {"seed": given.seed, "steps": given.steps, "minutes": round((time.time() - began) / 60, 1)}
    write_report(work, faults, checks, facts | harness.facts())
    print(table(faults))
    print(*(f"{'ok    ' if c.ok else 'FAILED'} {c.name}: {c.detail}" for c in checks), sep="\n")
    print(json.dumps(facts | harness.facts()), f"report: {work}/report.md", sep="\n")
    return 0 if all(c.ok for c in checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
