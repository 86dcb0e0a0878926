"""Measure on one GPU what no test without one can tell: ``python scripts/gpu_check.py [--out FILE] [--cpu]``.

It needs torch, triton, transformers and pydantic, and this repository's folder; no network. Each step runs in a process
of its own with a time limit, and one that fails is recorded with its error. The file is written after each step. All of
it takes less than 560 seconds. ``--cpu`` runs every step at tiny sizes, to check the script itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 550
STEPS = (  # name, seconds at most
    ("versions", 20),
    ("kernel_tests", 60),
    ("kernel_speed", 40),
    ("logprobs", 60),
    ("layers", 90),
    ("attention", 60),
    ("critic", 60),
    ("whole_model", 60),
    ("adamw", 30),
    ("save", 40),
    ("precision", 40),
)


def main() -> int:
    """Run the steps; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    begun = time.monotonic()
    sys.path.insert(0, str(ROOT))
    from actors.training.background_save import BackgroundSaver
    from dvpo_service.bench.gpu import kernels, measure, training

    if not arguments.cpu and not measure.torch.cuda.is_available():
        print("gpu_check: this machine has no CUDA device; --cpu checks the script itself", file=sys.stderr)
        return 2
    sizes = measure.TINY if arguments.cpu else measure.REAL
    results: dict[str, Any] = {}
    for name, limit in STEPS:
        work = getattr(kernels, name, None) or getattr(training, name)
        if name == "save":
            work = partial(work, saver=BackgroundSaver())
        left = LIMIT_S - (time.monotonic() - begun)
        results[name] = run(work, sizes, min(limit, left))
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        state = "failed" if "error" in results[name] else "done"
        print(f"{name}: {state}, {results[name]['step_s']} s", flush=True)
    failed = [name for name, result in results.items() if "error" in result]
    print(json.dumps({"file": str(arguments.out), "failed": failed}))
    return 1 if failed else 0


def run(work: Any, sizes: Any, limit_s: float) -> dict[str, Any]:
    """Return what ``work(sizes)`` returns, or its error, with the seconds that it took.

    It runs in a fork: the imports are done, and an error of the GPU does not reach the next step.
    """
    begun = time.monotonic()
    if limit_s < 5:
        return {"error": "not started: no time is left", "step_s": 0.0}
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as errors:
        process = context.Process(target=_process, args=(work, sizes, theirs, errors.fileno()))
        process.start()
        theirs.close()
        try:
            result = ours.recv() if ours.poll(limit_s) else {"error": f"no result within {limit_s:.0f} s"}
        except EOFError:
            process.join(10)
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["no message"]
            result = {"error": f"exit code {process.exitcode}: {lines[-1]}", "trace": lines[-30:]}
        process.kill()
        process.join(10)
    return result | {"step_s": round(time.monotonic() - begun, 1)}


def _process(work: Any, sizes: Any, answer: Any, errors: int) -> None:
    """Send the result; an exception ends the process, and its trace goes to the file ``errors``."""
    os.dup2(errors, sys.stderr.fileno())
    answer.send(work(sizes))
    os._exit(0)  # NCCL's and gloo's threads can abort the interpreter's own shutdown


if __name__ == "__main__":
    sys.exit(main())
