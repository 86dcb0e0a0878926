"""One rank of the critic pool: values and targets stay here, scalar advantages leave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from actors.fsdp import Rendezvous, Trainer, all_reduce, all_reduce_sums, init_process_group
from dvpo_service.algo.advantages import distributional_gae, mixture_targets, scalar_gae
from dvpo_service.algo.batching import rank_micro_batches
from dvpo_service.algo.critic_loss import TERMS, critic_loss, shift_sum
from dvpo_service.algo.diagnostics import critic_metrics, critic_sums
from dvpo_service.algo.quantiles import quantile_levels
from dvpo_service.config import Config
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads
from dvpo_service.models.load import load_backbone
from dvpo_service.models.sharding import shard
from dvpo_service.types import Metrics, Rollouts


@dataclass
class MicroBatch:
    """Sequences of this rank that share a forward pass, with their targets [b, T, M]."""

    rollouts: Rollouts
    targets: Tensor


@dataclass
class RankValues:
    """What a rank returns: ``rows`` [b] of the batch, advantages and values [b, T]."""

    rows: Tensor
    advantages: Tensor
    values: Tensor


class CriticWorker:
    """Evaluates and trains the distributional critic on this rank's sequences."""

    def __init__(self, config: Config, model_path: str, meet: Rendezvous):
        self.config, self.meet = config, meet
        self.device = init_process_group(meet)
        torch.manual_seed(config.trainer.seed)
        module = shard(
            _build(config, model_path),
            self.device,
            bfloat16=config.model.dtype == "bfloat16",
            checkpointing=config.critic.gradient_checkpointing,
        )
        minis = config.batch_size // (config.critic.mini_batch_size or config.batch_size)
        self.trainer = Trainer(
            module, config.critic.optim, total_steps=config.trainer.num_steps * config.critic.epochs * minis
        )
        # Count, sum and sum of squares of all returns so far: huber_scale=return_sd measures in them.
        self.trainer.extra["return_moments"] = torch.zeros(3, dtype=torch.float64)
        self.minis: list[list[MicroBatch]] = []
        self.first_shift: float | None = None
        self.levels = quantile_levels(config.algorithm.n_quantiles, config.algorithm.quantile_levels)

    @torch.no_grad()
    def evaluate(self, rollouts: Rollouts, step: int) -> tuple[RankValues, Metrics]:
        """Values, targets and advantages of this rank's whole sequences; targets are kept for ``update``."""
        algorithm, critic = self.config.algorithm, self.config.critic
        cut = rank_micro_batches(
            len(rollouts),
            mini_size=critic.mini_batch_size or len(rollouts),
            micro_size=critic.micro_batch_size,
            rank=self.meet.rank,
            world_size=self.meet.world_size,
            seed=self.config.trainer.seed,
            step=step,
        )
        width = rollouts.response_mask.shape[1]
        rows, advantages, values = [], [], []
        sums: dict[str, Tensor] = {}
        shift = torch.zeros((), dtype=torch.float64)
        self.minis = []
        for number, mini in enumerate(cut):
            self.minis.append([])
            for index in mini:
                part = rollouts.select(index)
                z, z_end = self._atoms(part)
                batch, adv, value, returns = self._targets(part, index, z, z_end, step)
                self.minis[-1].append(batch)
                rows.append(index)
                advantages.append(_widen(adv, width))
                values.append(_widen(value, width))
                if number == 0:
                    shift += shift_sum(z, batch.targets, part.response_mask, algorithm.critic_loss_spec()).double()
                found = critic_sums(
                    z, returns, part.response_mask, self.levels, algorithm.dvpo_alpha, algorithm.dvpo_beta
                )
                found |= _moments(returns, part.response_mask)
                sums = {k: sums.get(k, 0) + v for k, v in found.items()}
        # Parameters have not moved since, so the first mini-batch's mean shift is known already.
        sums["shift"] = shift
        sums = all_reduce_sums(sums, self.device)
        self.first_shift = float(sums.pop("shift")) / self._denominator(0)
        moments = torch.stack([sums.pop(k) for k in ("return_n", "return_sum", "return_squares")])
        self.trainer.extra["return_moments"] += moments
        local = RankValues(torch.cat(rows), torch.cat(advantages), torch.cat(values))
        return local, critic_metrics(sums)

    def update(self) -> Metrics:
        """Optimizer steps on the batch last evaluated."""
        metrics: Metrics = {}
        steps = skipped = 0
        for epoch in range(self.config.critic.epochs):
            for number, mini in enumerate(self.minis):
                first = epoch == 0 and number == 0
                found = self._step(number, mini, self.first_shift if first else None)
                skipped += int(found.pop("skipped"))
                steps += 1
                metrics = {k: metrics.get(k, 0.0) + v for k, v in found.items()}
        metrics = {k: v / steps for k, v in metrics.items()}
        return metrics | {"critic/skipped_steps": float(skipped), "critic/lr": self.trainer.lr}

    @torch.no_grad()
    def distributions(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Levels [M] and sorted ensemble quantiles [B, T, M] of given responses. Collective."""
        z, _ = self._atoms(rollouts)
        return self.levels, z.sort(dim=-1).values.mean(dim=2)

    def save(self, folder: str) -> None:
        self.trainer.save(Path(folder))

    def load(self, folder: str) -> None:
        self.trainer.load(Path(folder))

    def _step(self, number: int, mini: list[MicroBatch], mean_shift: float | None) -> dict[str, float]:
        spec = self.config.algorithm.critic_loss_spec()
        denominator, delta = self._denominator(number), self._delta()
        if mean_shift is None:
            mean_shift = self._mean_shift(mini, denominator)
        sums = {f"{kind}/{t}": torch.zeros((), dtype=torch.float64) for t in TERMS for kind in ("loss", "weighted")}

        def loss_of(batch: MicroBatch) -> Tensor:
            z, _ = self._atoms(batch.rollouts)
            mask = batch.rollouts.response_mask.to(z.device)
            loss = critic_loss(
                z,
                batch.targets.to(z.device),
                mask,
                spec,
                delta=delta,
                denominator=denominator,
                mean_shift=mean_shift,
            )
            for term in TERMS:
                sums[f"loss/{term}"] += loss.raw[term].double().cpu()
                sums[f"weighted/{term}"] += loss.weighted[term].double().cpu()
            return loss.total

        report = self.trainer.step(lambda b=b: loss_of(b) for b in mini)  # type: ignore[misc]
        metrics = {f"critic/{k}": float(v) for k, v in all_reduce_sums(sums, self.device).items()}
        metrics |= {
            "critic/dvpo_loss": report.loss,
            "critic/grad_norm": report.grad_norm,
            "critic/huber_delta": delta,
        }
        return metrics | {"skipped": float(report.skipped)}

    def _atoms(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Atoms at the response's T positions [b, T, H, M] and after its last token [b, H, M]."""
        part = rollouts
        tokens, t = part.tokens.to(self.device), part.response_mask.shape[1]
        lengths = (part.prompt_lens + part.response_lens).to(self.device)
        positions = response_positions(part.prompt_lens.to(self.device), t + 1, tokens.shape[1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.model.dtype == "bfloat16"):
            z = split_heads(self.trainer.module(tokens, lengths, positions), self.config.algorithm.n_heads)
        z_end = z[torch.arange(len(part), device=z.device), part.response_lens.to(z.device)]
        return z[:, :-1], z_end

    def _targets(
        self, part: Rollouts, rows: Tensor, z: Tensor, z_end: Tensor, step: int
    ) -> tuple[MicroBatch, Tensor, Tensor, Tensor]:
        """Target atoms, scalar advantages, values and Monte-Carlo returns, all on the CPU."""
        algorithm = self.config.algorithm
        quantiles, end = (x.cpu().sort(dim=-1).values.mean(dim=-2) for x in (z, z_end))
        bootstrap = ~part.finished if algorithm.bootstrap_truncated else torch.zeros_like(part.finished)
        end = torch.where(bootstrap[:, None], end, torch.zeros_like(end))
        rewards, mask = part.rewards, part.response_mask
        gamma, lam = algorithm.gamma, algorithm.lam
        if algorithm.critic_target == "gae":
            targets = distributional_gae(rewards, quantiles, mask, end, gamma, lam)
        else:
            seeds = (self.config.trainer.seed * 1_000_003 + step) * 1_000_003 + rows
            targets = mixture_targets(rewards, quantiles, mask, end, gamma, lam, seeds)
        value, value_end = quantiles.mean(-1), end.mean(-1)
        advantages, _ = scalar_gae(rewards, value, mask, value_end, gamma, lam)
        _, returns = scalar_gae(rewards, torch.zeros_like(value), mask, torch.zeros_like(value_end), gamma, 1.0)
        return MicroBatch(part, targets), advantages, torch.where(mask, value, 0.0), returns

    @torch.no_grad()
    def _mean_shift(self, mini: list[MicroBatch], denominator: float) -> float | None:
        """Global token mean of (mean target - mean prediction), which Eq. 7 over a batch needs up front."""
        if self.config.algorithm.shift_over != "batch":
            return None
        total = torch.zeros((), dtype=torch.float64)
        for batch in mini:
            z, _ = self._atoms(batch.rollouts)
            mask = batch.rollouts.response_mask.to(z.device)
            spec = self.config.algorithm.critic_loss_spec()
            total += shift_sum(z, batch.targets.to(z.device), mask, spec).double().cpu()
        return float(all_reduce(total, self.device)) / denominator

    def _denominator(self, number: int) -> float:
        """Valid tokens of mini-batch ``number`` over all ranks."""
        mine = sum(batch.rollouts.num_tokens for batch in self.minis[number])
        return max(1.0, float(all_reduce(torch.tensor(float(mine)), self.device)))

    def _delta(self) -> float:
        algorithm = self.config.algorithm
        if algorithm.huber_scale == "absolute":
            return algorithm.huber_delta
        n, total, squares = self.trainer.extra["return_moments"].tolist()
        variance = squares / n - (total / n) ** 2 if n else 1.0
        return algorithm.huber_delta * (max(variance, 0.0) ** 0.5 or 1.0)


def _build(config: Config, model_path: str) -> DistributionalCritic:
    trust = config.model.trust_remote_code
    if config.critic.init_from_policy:
        backbone = load_backbone(model_path, trust_remote_code=trust)
    else:
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(model_path, trust_remote_code=trust)).float()
    return DistributionalCritic(
        backbone,
        width=config.algorithm.critic_hidden_dim,
        num_heads=config.algorithm.n_heads,
        num_quantiles=config.algorithm.n_quantiles,
        seed=config.trainer.seed,
    )


def _moments(returns: Tensor, mask: Tensor) -> dict[str, Any]:
    valid = returns[mask].double()
    return {
        "return_n": torch.tensor(float(valid.numel()), dtype=torch.float64),
        "return_sum": valid.sum(),
        "return_squares": valid.square().sum(),
    }


def _widen(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
