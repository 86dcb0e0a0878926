"""A training run with faults from within: ``python -m tests.chaos.faulty_run CONFIG RUN_DIR PLAN``.

PLAN is a file written by ``tests.chaos.faults.write_plan``. The faults, and the service's reactions, are written to
``events.jsonl`` beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dvpo_service.commands.train import train
from dvpo_service.config import load_config
from dvpo_service.host import failure
from dvpo_service.host.stopping import Stopped
from tests.chaos.events import Events
from tests.chaos.faults import read_plan
from tests.chaos.injector import Injector


def main(config: str, run_dir: str, plan: str) -> None:
    resolved = load_config(config)
    file = Path(plan)
    Injector(read_plan(file), Events(file.with_name("events.jsonl")), resolved.trainer.num_steps).install()
    try:
        train(resolved, Path(run_dir))
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except Exception as error:  # noqa: BLE001 - reported as the command line does
        line, code = failure.describe(error)
        print(f"error: {line}", flush=True)
        sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
