"""``scripts/gpu_check.py`` on a machine that has torch, triton, transformers and pydantic, and nothing else."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ALONE = ("torch", "triton", "transformers", "pydantic")


def closure(names: tuple[str, ...]) -> set[str]:
    """Return the installed distributions that ``names`` require, themselves among them."""
    found: set[str] = set()
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # triton on a machine without GPUs
            continue
        found.add(name)
        for text in requires:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return found


def bare_machine(folder: Path) -> Path:
    """Make a folder of packages, as links to those that are installed."""
    for name in closure(ALONE):
        files = distribution(name).files or []
        for top in {f.parts[0] for f in files if not f.parts[0].startswith((".", "_"))} | {
            f.parts[0] for f in files if f.parts[0].startswith("_") and f.suffix in (".py", ".so")
        }:
            target = Path(str(distribution(name).locate_file(top)))
            link = folder / top
            if target.exists() and not link.exists():
                link.symlink_to(target)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    bare = tmp_path / "packages"
    bare.mkdir()
    return os.environ | {"PYTHONPATH": str(bare_machine(bare)), "OMP_NUM_THREADS": "1"}


def test_every_step_runs_on_a_bare_machine(tmp_path: Path, environment: dict[str, str]) -> None:
    # -S leaves out the installed packages, so that only the links are found.
    bare = [sys.executable, "-S"]
    command = [*bare, str(ROOT / "scripts/gpu_check.py"), "--cpu", "--out", str(tmp_path / "out.json")]
    settings: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    done = subprocess.run(command, timeout=120, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 11
    assert all(step["step_s"] >= 0 for step in results.values())
    assert results["logprobs"]["16"]["gradient_error"] < 1e-5
    assert 0 < results["precision"]["mean"] < 0.1
    refused = subprocess.run([*bare, "-c", "import ray"], timeout=60, **settings)
    assert "No module named 'ray'" in refused.stderr, "the machine is as bare as it should be"


def test_a_step_that_fails_is_recorded_with_its_error() -> None:
    script = runpy.run_path(str(ROOT / "scripts/gpu_check.py"))
    failed = script["run"](lambda sizes: 1 // sizes, 0, 60)
    assert "ZeroDivisionError" in failed["error"]
    assert script["run"](lambda sizes: {"half": sizes / 2}, 3, 60)["half"] == 1.5
    assert "no time is left" in script["run"](lambda sizes: {}, 0, 1)["error"]
