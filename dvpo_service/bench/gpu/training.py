"""Training steps, a whole model's forward pass, the optimizer, a checkpoint, and bfloat16's error."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dvpo_service.bench.gpu.measure import GIB, Sizes, backbone, causal_lm, one_rank, peak, random_tokens, timed
from dvpo_service.capacity.memory import devices
from dvpo_service.capacity.shape import shape_of
from dvpo_service.config import AlgorithmConfig, Config, CriticConfig
from dvpo_service.data.collate import collate
from dvpo_service.estimators.base import RunningStats, critic_objective
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads
from dvpo_service.models.policy import PolicyModel
from dvpo_service.models.sharding import all_ranks, shard
from dvpo_service.types import Prompt, Rollouts, Sample, Score

LAYERS = 4
PROMPT = 4  # tokens
STATS = RunningStats(return_sd=0.5, return_width=0.4, worst_value=0.0)


def layers(sizes: Sizes) -> dict[str, Any]:
    """Return the peak of two micro-batches and a step of four layers under FSDP2, and what ``dvpo plan`` expects."""
    found: dict[str, Any] = {}
    tokens = sizes.tokens[1]
    for name, checkpointing, deferred in (
        ("plain", False, False),
        ("checkpointing", True, False),
        ("checkpointing, deferred reduction", True, True),
    ):
        with one_rank(sizes.device), peak(sizes.device) as measured:
            _policy_step(sizes, tokens, checkpointing=checkpointing, deferred=deferred)
        found[name] = measured | {"planned_gib": _planned(sizes, tokens, checkpointing, deferred)}
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
    return found


def _policy_step(sizes: Sizes, tokens: int, *, checkpointing: bool, deferred: bool) -> None:
    lm = causal_lm(sizes, LAYERS)
    mesh = all_ranks(torch.device(sizes.device))
    module = shard(PolicyModel(lm, temperature=1.0), mesh, bfloat16=True, checkpointing=checkpointing)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=sizes.device == "cuda" or None)
    for _ in range(2):  # Adam's moments are there from the first step on
        for part in range(2):
            module.set_requires_gradient_sync(not deferred or part == 1)
            _score(module, random_tokens(sizes, 1, tokens)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _score(module: Any, tokens: Tensor) -> Tensor:
    """Return the log-probs of all but the first tokens."""
    rows, length = tokens.shape
    first, lengths = (torch.full((rows,), n, device=tokens.device) for n in (1, length))
    return module(tokens, first, lengths, length - 1, with_entropy=False)[0]


def _planned(sizes: Sizes, tokens: int, checkpointing: bool, deferred: bool) -> float:
    pool = {"micro_batch_size": 1, "gradient_checkpointing": checkpointing, "defer_gradient_reduction": deferred}
    config = Config.model_validate(
        {
            "model": {"path": "random", "dtype": "bfloat16"},
            "data": {"train_files": ["x"], "val_files": {"v": ["x"]}, "max_prompt_tokens": 1},
            "rollout": {"prompts_per_step": 2, "n": 1, "max_new_tokens": tokens - 1},
            "policy": pool,
        }
    )
    policy = devices(config, shape_of(sizes.model_config(LAYERS)))[0]
    return round(policy.size / GIB, 3)


def critic(sizes: Sizes) -> dict[str, Any]:
    """Return the seconds of a critic's evaluation and update, and the share of targets and loss."""
    found: dict[str, Any] = {}
    for rows, length in sizes.batches:
        part = _rollouts(sizes, rows, length)
        for form in ("paper", "calibrated"):
            algorithm = AlgorithmConfig.model_validate({"form": form, "n_quantiles": sizes.atoms[1]})
            with peak(sizes.device) as measured:
                seconds = _critic_step(sizes, algorithm, part)
            found[f"{form}, {rows} x {length}"] = seconds | measured
    return found


def _critic_step(sizes: Sizes, algorithm: AlgorithmConfig, part: Rollouts) -> dict[str, float]:
    objective = critic_objective(algorithm, CriticConfig())
    module: Any = DistributionalCritic(
        backbone(sizes, LAYERS),  # the heads compute in float32
        width=algorithm.critic_hidden_dim,
        num_heads=objective.heads,
        num_quantiles=objective.quantiles,
        seed=0,
    ).to(sizes.device)
    module.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.backbone.train()
    clock = _Clock(sizes.device)
    for _ in range(2):  # the first warms up
        clock.reset()
        with torch.no_grad():
            z, z_end = _values(module, part, objective.heads)
            clock("evaluate: forward")
            seeds = torch.arange(len(part))
            estimate = objective.estimate(z, z_end, part, seeds=seeds, pretraining=False, stats=STATS)
            clock("targets")
        z, _ = _values(module, part, objective.heads)
        clock("update: forward")
        loss, _ = objective.loss(
            z, estimate, part.response_mask, denominator=part.num_tokens, stats=STATS, batch_mean_shift=0.0
        )
        (slope,) = torch.autograd.grad(loss, z, retain_graph=True)
        clock("loss")
        z.backward(slope)
        module.zero_grad()
        clock("update: backward")
    own = clock.seconds["targets"] + clock.seconds["loss"]
    return clock.seconds | {"share_of_targets_and_loss": round(own / sum(clock.seconds.values()), 4)}


def _values(module: Any, part: Rollouts, heads: int) -> tuple[Tensor, Tensor]:
    t = part.response_mask.shape[1]
    positions = response_positions(part.prompt_lens, t + 1, part.tokens.shape[1])
    z = split_heads(module(part.tokens, part.prompt_lens + part.response_lens, positions), heads)
    return z[:, :-1], z[torch.arange(len(part)), part.response_lens]


def _rollouts(sizes: Sizes, rows: int, length: int) -> Rollouts:
    ids = random_tokens(sizes, rows, length).tolist()
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "", "x", tuple(r[:PROMPT])) for i, r in enumerate(ids)]
    logprobs = (0.0,) * (length - PROMPT)
    samples = [[Sample(i, 0, tuple(r[PROMPT:]), logprobs, "", "stop", 0)] for i, r in enumerate(ids)]
    scores = [[Score(float(i % 2), float(i % 2))] for i in range(rows)]
    return collate(prompts, samples, scores).to(torch.device(sizes.device))


class _Clock:
    """Seconds of each stage by name; a call ends a stage."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 5), now


@torch.no_grad()
def whole_model(sizes: Sizes) -> dict[str, Any]:
    """Return time and memory of log-probs under a whole model in bfloat16."""
    module = PolicyModel(causal_lm(sizes, sizes.layers, torch.bfloat16), temperature=1.0)
    return {str(n): timed(partial(_score, module, random_tokens(sizes, 1, n)), sizes.device, 1) for n in sizes.long[1:]}


def adamw(sizes: Sizes) -> dict[str, Any]:
    """Return time and memory of a step of AdamW, foreach and fused, on the bytes of a checkpoint."""
    found = {}
    for name in ("foreach", "fused"):
        weights = [torch.zeros(sizes.save // 64, device=sizes.device, requires_grad=True) for _ in range(4)]
        for w in weights:
            w.grad = torch.ones_like(w)
        options: dict[str, Any] = {name: True}
        found[name] = timed(torch.optim.AdamW(weights, lr=1e-3, **options).step, sizes.device)
    return found


def save(sizes: Sizes, saver: Any) -> dict[str, Any]:
    """Return the seconds for which a save stops training, and those until its files are written.

    Args:
      saver: a ``BackgroundSaver`` of the trainers.
    """
    tensors = {f"model.{i}": torch.zeros(sizes.save // 16, device=sizes.device) for i in range(4)}
    with one_rank(sizes.device), tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        saver.start(tensors, folder)
        stopped = time.perf_counter() - start
        files = saver.outcome(wait=True)
        total = time.perf_counter() - start
    size = sum(f.size for f in files.values())
    return {"gib": round(size / GIB, 3), "stopped_s": round(stopped, 3), "written_s": round(total, 3)}


@torch.no_grad()
def precision(sizes: Sizes) -> dict[str, Any]:
    """Return how far log-probs in bfloat16 are from those in float32 in four layers of random weights."""
    lm = causal_lm(sizes, LAYERS)
    tokens = random_tokens(sizes, 1, sizes.tokens[0])
    exact = _score(PolicyModel(lm, temperature=1.0), tokens)
    rounded = _score(PolicyModel(lm.bfloat16(), temperature=1.0), tokens).float()
    difference = rounded - exact
    kl = (difference.exp() - 1 - difference).mean()
    return {"mean": float(difference.abs().mean()), "largest": float(difference.abs().max()), "k3": float(kl)}
