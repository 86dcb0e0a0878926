"""How much time a distributional critic adds to a scalar critic's whole step, on a backbone of over 50M parameters."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, Qwen2Config

from dvpo_service.config import AlgorithmConfig, CriticConfig
from dvpo_service.data.collate import collate
from dvpo_service.estimators.base import CriticObjective, Estimate, RunningStats, critic_objective
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads
from dvpo_service.types import Prompt, Rollouts, Sample, Score

STATS = RunningStats(return_sd=0.5, return_width=0.4, worst_value=0.0)
VOCABULARY = 8192


def run(sequences: int = 4, prompt: int = 32, response: int = 96, repeats: int = 3) -> dict[str, Any]:
    """Return the seconds of a step (evaluate, targets, loss, backward, AdamW) of each kind of critic, and their ratios.

    The kinds run in alternation, ``repeats`` times after one step of warm-up.

    Args:
      sequences: sequences in the batch.
      prompt, response: tokens of each prompt and of each response.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    part = random_rollouts(sequences, prompt, response)
    kinds: dict[str, dict[str, Any]] = {
        "scalar": {"adv_estimator": "gae"},
        "paper": {"form": "paper"},
        "calibrated": {"form": "calibrated"},
        "robust": {"form": "robust"},  # with the Huber advantage
    }
    steps = {name: _Step(AlgorithmConfig.model_validate(kind), part) for name, kind in kinds.items()}
    parameters = sum(p.numel() for p in steps["scalar"].critic.backbone.parameters())
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            runs[name].append(step())
    seconds = {
        name: {stage: statistics.median(r[stage] for r in laps[1:]) for stage in laps[0]}  # the first step warms up
        for name, laps in runs.items()
    }
    totals = {name: sum(stages.values()) for name, stages in seconds.items()}
    return {
        "backbone_parameters": parameters,
        "tokens": sequences * (prompt + response),
        "response_tokens": sequences * response,
        "heads": 3,
        "quantiles": 200,
        "threads": 1,
        "seconds": {name: {k: round(v, 4) for k, v in stages.items()} for name, stages in seconds.items()},
        "step_s": {name: round(v, 3) for name, v in totals.items()},
        "overhead": {name: round(totals[name] / totals["scalar"] - 1, 4) for name in totals if name != "scalar"},
        "own_stages_share": {
            name: round((seconds[name]["targets"] + seconds[name]["loss"]) / totals[name], 4) for name in totals
        },
    }


class _Step:
    """One critic with its optimizer on a fixed batch. A call takes a step and returns the seconds of each stage."""

    def __init__(self, algorithm: AlgorithmConfig, part: Rollouts):
        self.part = part
        self.objective: CriticObjective = critic_objective(algorithm, CriticConfig())
        self.critic = DistributionalCritic(
            _backbone(),
            width=algorithm.critic_hidden_dim,
            num_heads=self.objective.heads,
            num_quantiles=self.objective.quantiles,
            seed=0,
        )
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=1e-5)

    def __call__(self) -> dict[str, float]:
        clock = _StageTimer()
        mask = self.part.response_mask
        with torch.no_grad():
            z, z_end = self._atoms()
            clock("evaluate: forward")
            estimate: Estimate = self.objective.estimate(
                z, z_end, self.part, seeds=torch.arange(len(self.part)), pretraining=False, stats=STATS
            )
            shift = float(self.objective.shift_sum(z, estimate.targets, mask)) / self.part.num_tokens
            clock("targets")
        z, _ = self._atoms()
        clock("update: forward")
        loss, _ = self.objective.loss(
            z, estimate, mask, denominator=self.part.num_tokens, stats=STATS, batch_mean_shift=shift
        )
        (slope,) = torch.autograd.grad(loss, z, retain_graph=True)
        clock("loss")
        z.backward(slope)
        clock("update: backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock("optimizer")
        return clock.seconds

    def _atoms(self) -> tuple[Tensor, Tensor]:
        """Return the atoms before each response token, and after the last token of each response."""
        part = self.part
        t = part.response_mask.shape[1]
        positions = response_positions(part.prompt_lens, t + 1, part.tokens.shape[1])
        z = split_heads(
            self.critic(part.tokens, part.prompt_lens + part.response_lens, positions), self.objective.heads
        )
        return z[:, :-1], z[torch.arange(len(part)), part.response_lens]


class _StageTimer:
    """Seconds of each stage, by name. A call ends a stage; the next one starts at once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


def _backbone() -> torch.nn.Module:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=1920,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=1024,
    )
    return AutoModel.from_config(config).float()


def random_rollouts(sequences: int, prompt: int, response: int) -> Rollouts:
    """Return responses of one length with random tokens; every second one is right."""
    rng = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCABULARY, (n,), generator=rng).tolist())

    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "", "bench", tokens(prompt)) for i in range(sequences)]
    samples = [[Sample(i, 0, tokens(response), (0.0,) * response, "", "stop", 0)] for i in range(sequences)]
    return collate(prompts, samples, [[Score(float(i % 2), float(i % 2))] for i in range(sequences)])
