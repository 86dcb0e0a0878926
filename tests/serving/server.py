"""Helpers: write a small export, and run ``dvpo serve`` on it in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import httpx

from dvpo_service.config import to_yaml
from dvpo_service.config.judge import JudgeConfig
from dvpo_service.export.export import CRITIC, Exported, open_export
from dvpo_service.export.states import EXPORT_FILE
from dvpo_service.models.critic import DistributionalCritic
from dvpo_service.models.fixed_sequences import record
from dvpo_service.models.load import load_backbone, load_causal_lm, load_tokenizer
from dvpo_service.models.small import save_small_model
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.judge import JudgePart
from dvpo_service.rewards.scoring import Result
from dvpo_service.runs.settings import CONFIG_FILE
from tests.builders import make_config

ROOT = Path(__file__).parents[2]
START_S = 300.0
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def make_export(
    folder: Path, *, step: int = 10, seed: int = 0, critic: bool = True, hidden_size: int = 64, **shape: int
) -> Exported:
    """Write an untrained policy and critic as a run exports them."""
    size = {"num_layers": 2, "num_heads": hidden_size // 32, "max_positions": 128} | shape
    save_small_model(folder, hidden_size=hidden_size, seed=seed, **size)
    record(load_causal_lm(str(folder)), load_tokenizer(str(folder)), folder)
    if critic:
        value_model = DistributionalCritic(
            load_backbone(str(folder)),
            width=32,
            num_heads=3,
            num_quantiles=20,
            seed=seed,
            quantile_levels="midpoint",
            beta=0.2,
        )
        value_model.save_pretrained(folder / CRITIC)
    config = make_config(folder, rollout={"enforce_eager": True})
    (folder / CONFIG_FILE).write_text(to_yaml(config.model_copy(update={"name": "tiny"})))
    (folder / EXPORT_FILE).write_text(json.dumps({"step": step}))
    return open_export(folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ServerProcess:
    """``dvpo serve`` on a free loopback port, until the ``with`` block ends."""

    def __init__(self, source: Path, *arguments: str, environment: dict[str, str] | None = None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process runs
        command = [sys.executable, "-m", "dvpo_service", "serve", "--run", str(source), f"serve.port={self.port}"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS} | (environment or {}),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def wait_ready(self) -> dict[str, Any]:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                answer = httpx.get(f"{self.url}/readyz", timeout=10)
                if answer.status_code == 200:
                    return answer.json()
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.5)
        raise AssertionError(f"the server did not come up:\n{self.output()[-3000:]}")

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


def judged_by(server: ServerProcess, model: str, messages: list[dict[str, str]]) -> Result:
    """Return the score that the server gives as a judge (``reward.judge``), asked the last message."""
    os.environ["JUDGE_KEY"] = "secret"
    judge = {"base_url": f"{server.url}/v1", "model": model, "prompt": "{{ prompt }}", "key_env": "JUDGE_KEY"}
    part = JudgePart(JudgeConfig.model_validate(judge | {"max_tokens": 8}))
    [[result]] = part.score([Work(["19"], "19", [0], messages=messages)])
    return result
