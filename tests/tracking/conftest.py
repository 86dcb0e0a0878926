from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from dvpo_service.config.schema import Config


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return once ``condition()`` is true; fail after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s"
        time.sleep(0.01)


@pytest.fixture
def make_config():
    def make(steps: int = 4, noise: str = "none", **tracking: Any) -> Config:
        return Config.model_validate(
            {
                "name": "demo",
                "model": {"warmstart": {}},
                "data": {"train_files": ["train.jsonl"], "val_files": {"val": ["val.jsonl"]}},
                "trainer": {"num_steps": steps},
                "reward": {"noise": {"kind": noise, "p": 0.1}},
                "tracking": tracking,
            }
        )

    return make
