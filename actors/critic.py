"""One rank of the critic pool: values and targets stay here, scalar advantages leave."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from actors.fsdp import (
    Rendezvous,
    Trainer,
    add_up,
    all_reduce,
    all_reduce_min,
    all_reduce_sums,
    full_state,
    init_process_group,
)
from dvpo_service.algo.advantages import returns_to_go
from dvpo_service.algo.batching import rank_micro_batches
from dvpo_service.algo.diagnostics import critic_metrics, critic_sums
from dvpo_service.algo.quantiles import quantile_levels
from dvpo_service.config import Config
from dvpo_service.estimators.objective import Carried, Estimate, critic_objective, critic_spec
from dvpo_service.integrity import Files
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads
from dvpo_service.models.critic_folder import CriticSpec
from dvpo_service.models.load import load_backbone
from dvpo_service.models.sharding import shard
from dvpo_service.storage import written_locally
from dvpo_service.types import Metrics, Rollouts

Sums = dict[str, Tensor]


@dataclass
class MicroBatch:
    """Sequences of this rank that share a forward pass, with what the critic made of them."""

    rollouts: Rollouts
    kept: Estimate


@dataclass
class MiniBatch:
    """This rank's part of one optimizer step; ``tokens`` and ``gate`` are over all ranks."""

    parts: list[MicroBatch] = field(default_factory=list)
    tokens: float = 0.0
    gate: float = 0.0


@dataclass
class RankValues:
    """What a rank returns: ``rows`` [b] of the batch, advantages and values [b, T]."""

    rows: Tensor
    advantages: Tensor
    values: Tensor


class CriticWorker:
    """Evaluates and trains the critic on this rank's sequences."""

    def __init__(self, config: Config, model_path: str, meet: Rendezvous):
        self.config, self.meet = config, meet
        self.device = init_process_group(meet)
        torch.manual_seed(config.trainer.seed)
        self.objective = critic_objective(config.algorithm, config.critic.value_clip)
        module = shard(
            _build(config, model_path, critic_spec(config.algorithm, self.objective)),
            self.device,
            bfloat16=config.model.dtype == "bfloat16",
            checkpointing=config.critic.gradient_checkpointing,
        )
        minis = config.batch_size // (config.critic.mini_batch_size or config.batch_size)
        self.trainer = Trainer(
            module, config.critic.optim, total_steps=config.trainer.num_steps * config.critic.epochs * minis
        )
        # Count, sum and sum of squares of all returns so far, and the least value of the last batch.
        self.trainer.extra["return_moments"] = torch.zeros(3, dtype=torch.float64)
        self.trainer.extra["worst_value"] = torch.zeros((), dtype=torch.float64)
        self.minis: list[MiniBatch] = []
        self.levels = quantile_levels(self.objective.quantiles, config.algorithm.quantile_levels)

    @torch.no_grad()
    def evaluate(self, rollouts: Rollouts, step: int) -> tuple[RankValues, Metrics]:
        """Values, targets and advantages of this rank's whole sequences; targets are kept for ``update``."""
        carried, cut = self._carried(), self._cut(len(rollouts), step)
        sums: Sums = {}
        totals = torch.zeros(len(cut), 2, dtype=torch.float64)  # valid tokens, gate
        self.minis, rows = [], []
        for number, mini in enumerate(cut):
            self.minis.append(MiniBatch())
            for index in mini:
                part = rollouts.select(index)
                z, z_end = self._atoms(part)
                kept = self._estimate(z, z_end, part, index, step, carried)
                self.minis[-1].parts.append(MicroBatch(part, kept))
                rows.append(index)
                add_up(sums, self._measure(z, part))
                totals[number] += self._totals(z, kept.targets, part)
        sums = all_reduce_sums(sums, self.device)
        totals = all_reduce(totals, self.device)
        for batch, (tokens, gate) in zip(self.minis, totals.tolist(), strict=True):
            batch.tokens = max(1.0, tokens)
            batch.gate = gate / batch.tokens
        self._carry(sums)
        estimates = [part.kept for mini in self.minis for part in mini.parts]
        width = rollouts.response_mask.shape[1]
        advantages, values = (
            torch.cat([_widen(x, width) for x in xs])
            for xs in ([e.advantages for e in estimates], [e.values for e in estimates])
        )
        return RankValues(torch.cat(rows), advantages, values), critic_metrics(sums)

    def update(self) -> Metrics:
        """Optimizer steps on the batch last evaluated."""
        metrics: Metrics = {}
        steps = skipped = 0
        for _ in range(self.config.critic.epochs):
            for mini in self.minis:
                found = self._step(mini)
                skipped += int(found.pop("skipped"))
                steps += 1
                metrics = {k: metrics.get(k, 0.0) + v for k, v in found.items()}
        metrics = {f"critic/{k}": v / steps for k, v in metrics.items()}
        return metrics | {"critic/skipped_steps": float(skipped), "critic/lr": self.trainer.lr}

    @torch.no_grad()
    def distributions(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Levels [M] and every head's sorted atoms [B, T, H, M] of given responses, on the CPU. Collective."""
        z, _ = self._atoms(rollouts)
        return self.levels, z.float().sort(dim=-1).values.cpu()

    def export(self, folder: str) -> None:
        """Write the critic as ``DistributionalCritic.from_pretrained`` loads it. Collective; rank 0 writes."""
        state = full_state(self.trainer.module)
        if self.meet.rank == 0:
            with written_locally(folder) as local:
                self.trainer.module.save_pretrained(local, state)

    def save(self, folder: str) -> None:
        self.trainer.save(folder)

    def saved(self, wait: bool) -> Files | None:
        return self.trainer.saved(wait=wait)

    def load(self, folder: str) -> None:
        self.trainer.load(folder)

    def _step(self, mini: MiniBatch) -> dict[str, float]:
        carried, sums = self._carried(), {"gate": torch.zeros((), dtype=torch.float64)}

        def loss_of(batch: MicroBatch) -> Tensor:
            z, _ = self._atoms(batch.rollouts)
            kept, mask = batch.kept.to(z.device), batch.rollouts.response_mask.to(z.device)
            loss, parts = self.objective.loss(z, kept, mask, denominator=mini.tokens, carried=carried, gate=mini.gate)
            add_up(sums, parts | {"gate": self.objective.gate(z.detach(), kept.targets, mask)})
            return loss

        report = self.trainer.step(lambda b=b: loss_of(b) for b in mini.parts)  # type: ignore[misc]
        metrics = {k: float(v) for k, v in all_reduce_sums(sums, self.device).items()}
        # The next epoch's gate is what this one saw: a forward pass only to know it would cost a third more.
        mini.gate = metrics.pop("gate") / mini.tokens
        return metrics | {
            self.objective.loss_name: report.loss,
            "grad_norm": report.grad_norm,
            "skipped": float(report.skipped),
        }

    def _atoms(self, part: Rollouts) -> tuple[Tensor, Tensor]:
        """Atoms at the response's T positions [b, T, H, M] and after its last token [b, H, M]."""
        tokens, t = part.tokens.to(self.device), part.response_mask.shape[1]
        lengths = (part.prompt_lens + part.response_lens).to(self.device)
        positions = response_positions(part.prompt_lens.to(self.device), t + 1, tokens.shape[1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.model.dtype == "bfloat16"):
            z = split_heads(self.trainer.module(tokens, lengths, positions), self.objective.heads)
        z_end = z[torch.arange(len(part), device=z.device), part.response_lens.to(z.device)]
        return z[:, :-1], z_end

    def _estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, rows: Tensor, step: int, carried: Carried
    ) -> Estimate:
        """On the CPU: targets of a whole batch wait there for their update."""
        trainer = self.config.trainer
        return self.objective.estimate(
            z,
            z_end,
            part,
            seeds=(trainer.seed * 1_000_003 + step) * 1_000_003 + rows,
            pretraining=step < trainer.critic_warmup,
            carried=carried,
        ).to(torch.device("cpu"))

    def _measure(self, z: Tensor, part: Rollouts) -> Sums:
        algorithm = self.config.algorithm
        mask = part.response_mask.to(z.device)
        returns = returns_to_go(part.rewards.to(z.device), mask, algorithm.gamma)
        near = 0.05 * self._carried().return_sd  # where a predicted quantile and a 0/1 reward are the same
        return critic_sums(z, returns, mask, self.levels, algorithm.dvpo_alpha, algorithm.dvpo_beta, near)

    def _totals(self, z: Tensor, targets: Tensor, part: Rollouts) -> Tensor:
        mask = part.response_mask.to(z.device)
        return torch.stack([mask.sum().double(), self.objective.gate(z, targets.to(z.device), mask)]).cpu()

    def _cut(self, batch_size: int, step: int) -> list[list[Tensor]]:
        critic = self.config.critic
        return rank_micro_batches(
            batch_size,
            mini_size=critic.mini_batch_size or batch_size,
            micro_size=critic.micro_batch_size,
            rank=self.meet.rank,
            world_size=self.meet.world_size,
            seed=self.config.trainer.seed,
            step=step,
        )

    def _carried(self) -> Carried:
        n, total, squares = self.trainer.extra["return_moments"].tolist()
        variance = squares / n - (total / n) ** 2 if n else 1.0
        return Carried(max(variance, 0.0) ** 0.5, float(self.trainer.extra["worst_value"]))

    def _carry(self, sums: Sums) -> None:
        """Remember this batch's returns and worst value; ``sums`` are over all ranks."""
        self.trainer.extra["return_moments"] += torch.stack([sums[k] for k in ("count", "return", "return_sq")])
        valid = [p.kept.values[p.rollouts.response_mask] for m in self.minis for p in m.parts]
        low = min((float(v.min()) for v in valid if v.numel()), default=math.inf)
        worst = all_reduce_min(torch.tensor(low, dtype=torch.float64), self.device)
        if worst.isfinite():
            self.trainer.extra["worst_value"] = worst


def _build(config: Config, model_path: str, spec: CriticSpec) -> DistributionalCritic:
    trust = config.model.trust_remote_code
    if config.critic.init_from_policy:
        backbone = load_backbone(model_path, trust_remote_code=trust)
    else:
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(model_path, trust_remote_code=trust)).float()
    return DistributionalCritic(
        backbone, **dataclasses.asdict(spec), seed=config.trainer.seed, packing=config.critic.packing
    )


def _widen(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
