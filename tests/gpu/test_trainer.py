"""A policy's update on a GPU: the flash kernel is enough for right padding, and AdamW is fused.

It runs in a process of its own, which takes the first GPU that it sees.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel

from actors.cluster.pool import Rendezvous
from actors.training.policy import PolicyWorker
from dvpo_service.config import Config
from dvpo_service.host.network import free_port
from tests.builders import make_config, make_rollouts

pytestmark = pytest.mark.gpu(1)


def _process(rank: int, config: Config, model: str) -> None:
    worker = PolicyWorker(config, model, Rendezvous(0, 1, "127.0.0.1", free_port(), 60))
    assert worker.device.type == "cuda"
    assert worker.trainer.optimizer.defaults["fused"]
    rollouts = make_rollouts(seed=3)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where a mask rules the kernel out
        answer = worker.logprobs(rollouts, 0)
        before = {"logprobs": answer.logprobs[answer.rows.argsort()]}
        metrics = worker.update(rollouts, before, torch.ones(rollouts.rewards.shape), 0)
    assert metrics["policy/skipped_steps"] == 0
    assert abs(metrics["policy/approx_kl"]) < 1e-2
    os._exit(0)


def test_an_update_needs_no_mask(tiny_model: Path) -> None:
    config = make_config(tiny_model, model={"path": str(tiny_model), "dtype": "bfloat16"})
    mp.spawn(_process, (config, str(tiny_model)), nprocs=1)
