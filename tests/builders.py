"""Small configs, batches and checksums that tests build on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dvpo_service.config import Config
from dvpo_service.data.collate import collate
from dvpo_service.runs.integrity import Files, FileSum, sum_of
from dvpo_service.runs.storage import StoragePath, files_below
from dvpo_service.types import Prompt, Rollouts, Sample, Score


def needs(missing: str | None) -> pytest.MarkDecorator:
    """Skip a test if this machine lacks ``missing`` (None: it lacks nothing). In CI the test runs, and fails."""
    return pytest.mark.skipif(missing is not None and "DVPO_CI" not in os.environ, reason=missing or "")


def make_config(model: Path | str, /, **sections: dict[str, Any]) -> Config:
    """Return a config of a few small steps; ``sections`` are merged one level deep."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "data": {"train_files": ["shipped:demo-train.jsonl"], "val_files": {"val": ["shipped:demo-val.jsonl"]}},
        "rollout": {"prompts_per_step": 4, "n": 4, "max_new_tokens": 8},
        "algorithm": {"n_quantiles": 20, "n_heads": 3, "critic_hidden_dim": 32},
        "critic": {"micro_batch_size": 4, "mini_batch_size": 8},
        "policy": {"micro_batch_size": 4, "mini_batch_size": 8},
        "trainer": {"num_steps": 4},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return Config.model_validate(tree)


def make_rollouts(prompts: int = 4, n: int = 4, *, seed: int = 0, max_new: int = 8) -> Rollouts:
    """Return random responses of uneven length; one failed to score, and one was cut at the limit."""
    rng = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    rows, groups, scores = [], [], []
    for i in range(prompts):
        ids = tuple(integer(4, 200) for _ in range(integer(2, 7)))
        rows.append(Prompt(i, ({"role": "user", "content": "?"},), "1", "test", ids))
        group = [
            Sample(
                i,
                j,
                tokens := tuple(integer(4, 200) for _ in range(integer(1, max_new + 1))),
                tuple(-float(torch.rand((), generator=rng)) for _ in tokens),
                "",
                "length" if (i, j) == (1, 1) else "stop",
                0,
            )
            for j in range(n)
        ]
        groups.append(group)
        outcomes = [float(integer(0, 2)) for _ in group]
        scores.append([Score(o, o) for o in outcomes])
    scores[0][0] = Score(float("nan"), float("nan"), "the reward function raised")
    return collate(rows, groups, scores)


def sums_of(folder: StoragePath) -> Files:
    """Return the checksums of all files below ``folder``, as the process that wrote them reports them."""

    def checksum(name: str) -> FileSum:
        with (folder / name).open("rb") as stream:
            return sum_of(stream)

    return {name: checksum(name) for name in files_below(folder)}
