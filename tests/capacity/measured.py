"""``python -m tests.capacity.measured MODEL JSON``: the memory that an update of the policy or critic really takes.

A process of its own for each, because memory that was freed counts until the process ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from actors.cluster.pool import Rendezvous
from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from dvpo_service.config import Config
from dvpo_service.data.collate import collate
from dvpo_service.host.network import free_port
from dvpo_service.types import Prompt, Rollouts, Sample, Score


def full_batch(config: Config) -> Rollouts:
    """Return a batch in which every prompt and response is as long as it may be."""
    length, tokens = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    count = config.rollout.prompts_per_step
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "1", "x", (5,) * length) for i in range(count)]
    sample = Sample(0, 0, (6,) * tokens, (-1.0,) * tokens, "", "stop", 0)
    n = config.rollout.n
    return collate(prompts, [[sample] * n] * count, [[Score(1.0, 1.0)] * n] * count)


class Peak:
    """The largest memory of this process so far, without pages of files, which the kernel may drop."""

    def __init__(self) -> None:
        self.before = self.largest = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def grown(self) -> int:
        """Bytes by which the largest is above what there was at the beginning."""
        return self.largest - self.before

    def _watch(self) -> None:
        while True:
            self.largest = max(self.largest, self._now())
            time.sleep(0.005)

    def _now(self) -> int:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * os.sysconf("SC_PAGESIZE")


def main(pool: str, text: str) -> None:
    """Print the bytes by which the process grew, at its largest."""
    torch.set_num_threads(1)
    config = Config.model_validate_json(text)
    rollouts = full_batch(config)
    assert config.model.path is not None
    peak = Peak()
    meet = Rendezvous(0, 1, "127.0.0.1", free_port(), 60)
    worker: Any = (PolicyWorker if pool == "policy" else CriticWorker)(config, config.model.path, meet)
    for step in range(2):
        if pool == "policy":
            advantages = torch.ones(rollouts.rewards.shape)
            worker.update(rollouts, {"logprobs": rollouts.rollout_logprobs}, advantages, step)
        else:
            worker.evaluate(rollouts, {}, step)
            worker.update()
    print(json.dumps({"before": peak.before, "grown": peak.grown}), flush=True)
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


if __name__ == "__main__":
    main(*sys.argv[1:])
