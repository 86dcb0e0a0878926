"""``dvpo serve`` on a cluster where a server runs already updates the weights and changes nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.raycluster import ROOT, RayCluster, environment
from tests.serving.server import ServerProcess, make_export

pytestmark = pytest.mark.e2e


def test_an_update_from_another_shell_leaves_address_key_and_engine(tmp_path: Path) -> None:
    for step in (10, 20):
        make_export(tmp_path / str(step), step=step, seed=step)
    with RayCluster() as cluster:
        head = cluster.start_head(cpus=4)
        shell = environment() | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
        with ServerProcess(tmp_path / "10", environment=shell | {"DVPO_API_KEY": "secret"}) as server:

            def engines() -> set[int]:
                family = psutil.Process(head.process.pid).children(recursive=True)
                return {p.pid for p in family if "VLLM::EngineCore" in " ".join(p.cmdline())}

            def ask(key: str) -> httpx.Response:
                body = {"prompt": "1+1=", "max_tokens": 2}
                headers = {"authorization": f"Bearer {key}"}
                return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)

            before = engines()
            assert len(before) == 1
            assert ask("secret").headers["x-dvpo-version"] == "step-000010"
            command = [sys.executable, "-m", "dvpo_service", "serve", "--run", str(tmp_path / "20")]
            done = subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "updated: step-000010 -> step-000020" in done.stdout + done.stderr
            assert ask("secret").headers["x-dvpo-version"] == "step-000020"
            assert ask("none").status_code == 401
            assert engines() == before
