"""One rank of the critic pool: distributions and targets stay on it, scalar advantages and values leave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from actors.cluster.pool import Rendezvous
from actors.training.process_group import add_up, all_reduce, all_reduce_min, all_reduce_sums, init_process_group
from actors.training.trainer import Trainer, UpdateMetrics
from actors.training.worker import TrainerWorker
from dvpo_service.algo.advantages import returns_to_go
from dvpo_service.algo.diagnostics import critic_metrics, critic_sums, merged_moments
from dvpo_service.algo.quantiles import quantile_levels
from dvpo_service.algo.robust_width import add_batch, no_widths, running_width
from dvpo_service.config import Config
from dvpo_service.estimators.base import Estimate, RunningStats, critic_objective, critic_spec
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads
from dvpo_service.models.critic_folder import CriticSpec
from dvpo_service.models.load import compute_soft_caps, load_backbone, text_model
from dvpo_service.models.lora import add_adapter
from dvpo_service.models.sharded_load import in_turns, load_sharded
from dvpo_service.models.sharding import all_ranks, shard
from dvpo_service.runs.storage import written_locally
from dvpo_service.types import Metrics, Rollouts

Sums = dict[str, Tensor]


@dataclass
class MicroBatch:
    """Sequences of this rank that share a forward pass, with the critic's estimate for them."""

    rollouts: Rollouts
    estimate: Estimate


@dataclass
class Minibatch:
    """This rank's part of one optimizer step; ``tokens`` and ``mean_shift`` are over all ranks."""

    parts: list[MicroBatch] = field(default_factory=list)
    tokens: float = 0.0
    mean_shift: float = 0.0


@dataclass
class RankValues:
    """What a rank returns for its sequences: their ``rows`` [b] in the batch, advantages and values [b, T]."""

    rows: Tensor
    advantages: Tensor
    values: Tensor


class CriticWorker(TrainerWorker):
    """Evaluates and trains the critic on this rank's sequences. Every rank calls every method in the same order."""

    def __init__(self, config: Config, model_path: str, meet: Rendezvous):
        self.config, self.meet = config, meet
        self.device = init_process_group(meet)
        torch.manual_seed(config.trainer.seed)
        self.objective = critic_objective(config.algorithm, config.critic)
        module = _build(config, model_path, critic_spec(config.algorithm, self.objective), self.device)
        minibatches = config.batch_size // (config.critic.mini_batch_size or config.batch_size)
        steps = config.trainer.num_steps * config.critic.epochs * minibatches
        self.trainer = Trainer(
            module,
            config.critic.optim,
            total_steps=steps,
            own_lrs={"value": config.critic.head_lr} if config.critic.head_lr else {},
            defer_reduction=config.critic.defer_gradient_reduction,
        )
        # Of all returns so far: count, mean and sum of squared deviations, and widths; the last batch's least value.
        self.trainer.extra["return_spread"] = torch.zeros(3, dtype=torch.float64)
        self.trainer.extra["return_widths"] = no_widths()
        self.trainer.extra["worst_value"] = torch.zeros((), dtype=torch.float64)
        self.minibatches: list[Minibatch] = []
        self.levels = quantile_levels(self.objective.quantiles, config.algorithm.quantile_levels)

    @torch.no_grad()
    def evaluate(self, rollouts: Rollouts, changes: dict[str, Tensor], step: int) -> tuple[RankValues, Metrics]:
        """Compute values, targets and advantages of this rank's whole sequences; keep the targets for ``update``.

        Args:
          rollouts: the step's batch.
          changes: fields of the batch that later stages set, by name.
          step: number of the step.

        Returns:
          This rank's advantages and values, and metrics over all ranks.
        """
        rollouts = rollouts.with_(**changes)
        stats = self._running_stats()
        split = self.split(self.config.critic, rollouts, step)
        centre = self._a_return(rollouts)
        sums: Sums = {}
        totals = torch.zeros(len(split), 2, dtype=torch.float64)  # valid tokens, sum of the mean shift
        rows: list[Tensor] = []
        self.minibatches = []
        for number, indices in enumerate(split):
            minibatch = Minibatch()
            self.minibatches.append(minibatch)
            for index in indices:
                part = rollouts.select(index)
                z, z_end = self._atoms(part)
                estimate = self._estimate(z, z_end, part, index, step, stats)
                minibatch.parts.append(MicroBatch(part, estimate))
                rows.append(index)
                add_up(sums, self._measure(z, part, stats, centre))
                totals[number] += self._totals(z, estimate.targets, part)
        sums = all_reduce_sums(sums, self.device)
        totals = all_reduce(totals, self.device)
        for minibatch, (tokens, shift) in zip(self.minibatches, totals.tolist(), strict=True):
            minibatch.tokens = max(1.0, tokens)
            minibatch.mean_shift = shift / minibatch.tokens
        self._remember(sums, centre, rollouts)
        metrics = critic_metrics(sums, centre) | {"critic/return_width": self._running_stats().return_width}
        return self._values(rows, rollouts.response_mask.shape[1]), metrics

    def update(self) -> Metrics:
        """Take the optimizer steps of ``critic.epochs`` over the batch last evaluated; return their metrics."""
        metrics = UpdateMetrics("critic", self.objective.loss_name)
        stats = self._running_stats()
        for _ in range(self.config.critic.epochs):
            for minibatch in self.minibatches:
                sums: Sums = {"shift_sum": torch.zeros((), dtype=torch.float64)}
                report = self.trainer.step(self._losses(minibatch, stats, sums))
                measured = all_reduce_sums(sums, self.device)
                # The next epoch uses this epoch's mean. A forward pass just to measure it would cost a third more.
                minibatch.mean_shift = float(measured.pop("shift_sum")) / minibatch.tokens
                metrics.add(report, measured)
        return metrics.result(self.trainer.lr)

    @torch.no_grad()
    def distributions(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Return levels [M] and every head's sorted atoms [B, T, H, M] of given responses, on the CPU. Collective."""
        z, _ = self._atoms(rollouts)
        return self.levels, z.float().sort(dim=-1).values.cpu()

    def export(self, folder: str) -> None:
        """Write the critic as ``DistributionalCritic.from_pretrained`` loads it. Collective; rank 0 writes."""
        if self.meet.rank > 0:
            self.trainer.module.save_pretrained(None)
            return
        with written_locally(folder) as local:
            self.trainer.module.save_pretrained(local)

    def _losses(self, minibatch: Minibatch, stats: RunningStats, sums: Sums) -> list[Callable[[], Tensor]]:
        """Return a function for each micro-batch that computes its loss, and adds its measurements to ``sums``."""

        def loss(batch: MicroBatch) -> Tensor:
            z, _ = self._atoms(batch.rollouts)
            estimate = batch.estimate.to(z.device)
            mask = batch.rollouts.response_mask.to(z.device)
            total, parts = self.objective.loss(
                z,
                estimate,
                mask,
                denominator=minibatch.tokens,
                stats=stats,
                batch_mean_shift=minibatch.mean_shift,
            )
            add_up(sums, parts | {"shift_sum": self.objective.shift_sum(z.detach(), estimate.targets, mask)})
            return total

        return [partial(loss, batch) for batch in minibatch.parts]

    def _atoms(self, part: Rollouts) -> tuple[Tensor, Tensor]:
        """Return the atoms at the response's T positions [b, T, H, M] and after its last token [b, H, M]."""
        tokens = part.tokens.to(self.device)
        t = part.response_mask.shape[1]
        lengths = (part.prompt_lens + part.response_lens).to(self.device)
        positions = response_positions(part.prompt_lens.to(self.device), t + 1, tokens.shape[1])
        z = split_heads(self.trainer.module(tokens, lengths, positions), self.objective.heads)
        z_end = z[torch.arange(len(part), device=z.device), part.response_lens.to(z.device)]
        return z[:, :-1], z_end

    def _estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, rows: Tensor, step: int, stats: RunningStats
    ) -> Estimate:
        """Return the objective's estimate, on the CPU, where the targets of the whole batch wait for the update."""
        trainer = self.config.trainer
        return self.objective.estimate(
            z,
            z_end,
            part,
            seeds=row_seeds(trainer.seed, step, rows),
            pretraining=step < trainer.critic_warmup,
            stats=stats,
        ).to(torch.device("cpu"))

    def _measure(self, z: Tensor, part: Rollouts, stats: RunningStats, centre: float) -> Sums:
        algorithm = self.config.algorithm
        mask = part.response_mask.to(z.device)
        returns = returns_to_go(part.rewards.to(z.device), mask, algorithm.gamma)
        near = 0.05 * stats.return_sd  # a predicted quantile this close to a 0/1 reward counts as equal to it
        tails = (algorithm.dvpo_alpha, algorithm.dvpo_beta)
        return critic_sums(z, returns, mask, self.levels, *tails, tolerance=near, centre=centre)

    def _a_return(self, rollouts: Rollouts) -> float:
        """Return the first valid return of the whole batch, the same on every rank; 0 where there is none."""
        mask = rollouts.response_mask
        valid = returns_to_go(rollouts.rewards, mask, self.config.algorithm.gamma)[mask]
        return float(valid[0]) if valid.numel() else 0.0

    def _totals(self, z: Tensor, targets: Tensor, part: Rollouts) -> Tensor:
        mask = part.response_mask.to(z.device)
        return torch.stack([mask.sum().double(), self.objective.shift_sum(z, targets.to(z.device), mask)]).cpu()

    def _values(self, rows: list[Tensor], width: int) -> RankValues:
        estimates = [part.estimate for minibatch in self.minibatches for part in minibatch.parts]
        advantages = torch.cat([_widen(e.advantages, width) for e in estimates])
        values = torch.cat([_widen(e.values, width) for e in estimates])
        return RankValues(torch.cat(rows), advantages, values)

    def _running_stats(self) -> RunningStats:
        extra = self.trainer.extra
        n, _, squares = extra["return_spread"].tolist()
        return RunningStats(
            return_sd=(squares / n if n else 1.0) ** 0.5,
            return_width=running_width(extra["return_widths"]),
            worst_value=float(extra["worst_value"]),
        )

    def _remember(self, sums: Sums, centre: float, rollouts: Rollouts) -> None:
        """Add this batch's returns to the running moments and widths, and keep its worst value.

        ``sums`` are over all ranks, around ``centre``; ``rollouts`` are the whole batch.
        """
        mask = rollouts.response_mask
        returns = returns_to_go(rollouts.rewards, mask, self.config.algorithm.gamma)[mask]
        self.trainer.extra["return_widths"] = add_batch(self.trainer.extra["return_widths"], returns)
        self.trainer.extra["return_spread"] = merged_moments(self.trainer.extra["return_spread"], sums, centre)
        valid = [p.estimate.values[p.rollouts.response_mask] for m in self.minibatches for p in m.parts]
        low = min((float(v.min()) for v in valid if v.numel()), default=math.inf)
        worst = all_reduce_min(torch.tensor(low, dtype=torch.float64), self.device)
        if worst.isfinite():
            self.trainer.extra["worst_value"] = worst


def _build(config: Config, model_path: str, spec: CriticSpec, device: torch.device) -> Any:
    """Return the sharded critic. The heads are whole on every rank until they are sharded, from the run's seed."""
    mesh = all_ranks(device)
    trust = config.model.trust_remote_code

    def build(backbone: Any) -> Any:
        if config.critic.lora:
            backbone = add_adapter(backbone, config.critic.lora, seed=config.trainer.seed)
        return shard(
            DistributionalCritic(
                backbone, **dataclasses.asdict(spec), seed=config.trainer.seed, packing=config.critic.packing
            ),
            mesh,
            bfloat16=config.model.dtype == "bfloat16",
            checkpointing=config.critic.gradient_checkpointing,
        )

    def untrained() -> Any:
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(model_path, trust_remote_code=trust)).float()
        compute_soft_caps(backbone)
        return build(text_model(backbone))

    if config.critic.lora:
        return in_turns(lambda: build(load_backbone(model_path, trust_remote_code=trust)), mesh)
    if config.critic.init_from_policy:
        return load_sharded(model_path, build, mesh, head=False, trust_remote_code=trust)
    return in_turns(untrained, mesh)


def row_seeds(run_seed: int, step: int, rows: Tensor) -> Tensor:
    """Return a seed for each of the batch's rows, [b] int64 in [0, 2**63), for any seed that a config takes."""
    base = ((run_seed * 1_000_003 + step) * 1_000_003) % 2**62
    return base + rows


def _widen(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
