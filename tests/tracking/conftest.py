from __future__ import annotations

from typing import Any

import pytest

from dvpo_service.config.schema import Config


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
