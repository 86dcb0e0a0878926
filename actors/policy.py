"""One rank of the policy pool: log-probs, the clipped update, weights out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actors.fsdp import Rendezvous, Trainer, add_up, all_reduce, all_reduce_sums, full_state, init_process_group
from dvpo_service.algo.aggregation import token_weights, weighted_sum
from dvpo_service.algo.batching import rank_micro_batches
from dvpo_service.algo.diagnostics import policy_metrics, policy_sums
from dvpo_service.algo.policy_loss import clipped_surrogate, importance_weights, kl_penalty
from dvpo_service.config import Config
from dvpo_service.integrity import Files
from dvpo_service.models.load import load_causal_lm, load_tokenizer
from dvpo_service.models.policy import PolicyModel
from dvpo_service.models.sharding import shard
from dvpo_service.storage import written_locally
from dvpo_service.types import Metrics, Rollouts

if TYPE_CHECKING:
    from actors.weight_transfer import Backend, EngineClient

Sums = dict[str, Tensor]


@dataclass
class RankLogprobs:
    """``rows`` [b] of the batch; log-probs [b, T]."""

    rows: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None


class PolicyWorker:
    """Scores and trains the policy on this rank's sequences."""

    def __init__(self, config: Config, model_path: str, meet: Rendezvous):
        self.config, self.meet, self.model_path = config, meet, model_path
        self.device = init_process_group(meet)
        torch.manual_seed(config.trainer.seed)
        module: Any = self._load()
        minis = config.batch_size // (config.policy.mini_batch_size or config.batch_size)
        self.trainer = Trainer(
            module, config.policy.optim, total_steps=config.trainer.num_steps * config.policy.epochs * minis
        )
        self.reference = self._load().requires_grad_(False) if config.policy.kl.coef > 0 else None
        self.transfer: Any = None
        self.membership: Any = None  # the engines that the transfer reaches
        # Takes seconds, for vLLM's transfer: now, while the engines start, and not at the first push.
        from actors import cpu_weight_transfer  # noqa: F401

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, step: int) -> RankLogprobs:
        """Log-probs of the sampled tokens before the update, and under the reference if there is one."""
        rows, found, ref = [], [], []
        width = rollouts.response_mask.shape[1]
        for mini in self._cut(len(rollouts), step):
            for index in mini:
                part = rollouts.select(index)
                rows.append(index)
                found.append(_widen(self._score(self.trainer.module, part)[0], part, width))
                if self.reference is not None:
                    ref.append(_widen(self._score(self.reference, part)[0], part, width))
        return RankLogprobs(torch.cat(rows), torch.cat(found), torch.cat(ref) if ref else None)

    def update(self, rollouts: Rollouts, advantages: Tensor, step: int) -> Metrics:
        """PPO epochs over the batch. ``advantages`` [B, T] as the loss takes them."""
        metrics: Metrics = {}
        sums: Sums = {}
        steps = skipped = 0
        for _ in range(self.config.policy.epochs):
            for mini in self._cut(len(rollouts), step):
                found = self._step(rollouts, advantages, mini, sums)
                skipped += int(found.pop("skipped"))
                steps += 1
                metrics = {k: metrics.get(k, 0.0) + v for k, v in found.items()}
        metrics = {f"policy/{k}": v / steps for k, v in metrics.items()}
        metrics |= policy_metrics(all_reduce_sums(sums, self.device))
        return metrics | {"policy/skipped_steps": float(skipped), "policy/lr": self.trainer.lr}

    def send_weights(self, client: EngineClient, backend: Backend) -> dict[int, str]:
        """Push the current weights to the client's engines; returns when they hold them. Collective.

        Joins vLLM's weight transfer first where the engines are others than at the last push. Rank 0
        returns the engines lost on the way, by number, with the cause.
        """
        from actors.weight_transfer import connect

        if self.membership != client.membership:
            if self.transfer is not None:
                self.transfer.shutdown()
            self.transfer = connect(self.trainer.module.backbone, client, backend, self.meet.rank)
            self.membership = client.membership
        self.transfer.client = client
        self.transfer.send_weights()
        return client.lost

    def export(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder. Collective; rank 0 writes."""
        state = full_state(self.trainer.module.backbone)
        if self.meet.rank == 0:
            trust = self.config.model.trust_remote_code
            lm = load_causal_lm(self.model_path, trust_remote_code=trust)
            with written_locally(folder) as local:
                lm.save_pretrained(local, state_dict=state)  # type: ignore[operator]
                load_tokenizer(self.model_path, trust_remote_code=trust).save_pretrained(local)

    def save(self, folder: str) -> None:
        self.trainer.save(folder)

    def saved(self, wait: bool) -> Files | None:
        return self.trainer.saved(wait=wait)

    def load(self, folder: str) -> None:
        self.trainer.load(folder)

    def _load(self) -> Any:
        lm = load_causal_lm(self.model_path, trust_remote_code=self.config.model.trust_remote_code)
        return shard(
            PolicyModel(lm, temperature=self.config.rollout.temperature, packing=self.config.policy.packing),
            self.device,
            bfloat16=self.config.model.dtype == "bfloat16",
            checkpointing=self.config.policy.gradient_checkpointing,
        )

    def _cut(self, batch_size: int, step: int) -> list[list[Tensor]]:
        policy = self.config.policy
        return rank_micro_batches(
            batch_size,
            mini_size=policy.mini_batch_size or batch_size,
            micro_size=policy.micro_batch_size,
            rank=self.meet.rank,
            world_size=self.meet.world_size,
            seed=self.config.trainer.seed,
            step=step,
        )

    def _score(self, module: Any, part: Rollouts) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.model.dtype == "bfloat16"):
            return module(
                part.tokens.to(self.device),
                part.prompt_lens.to(self.device),
                (part.prompt_lens + part.response_lens).to(self.device),
                part.response_mask.shape[1],
            )

    def _step(self, rollouts: Rollouts, advantages: Tensor, mini: list[Tensor], sums: Sums) -> dict[str, float]:
        """One optimizer step on this rank's rows of a mini-batch; adds to ``sums``."""
        masks = [rollouts.response_mask[rows] for rows in mini]
        counts = torch.tensor([[m.sum(), m.any(1).sum()] for m in masks], dtype=torch.float64).sum(0)
        tokens, sequences = all_reduce(counts, self.device).clamp(min=1).tolist()
        parts: Sums = {}

        def loss_of(rows: Tensor) -> Tensor:
            part = rollouts.select(rows)
            mask = part.response_mask
            weights = token_weights(
                mask,
                self.config.policy.loss_agg,
                num_tokens=tokens,
                num_sequences=sequences,
                horizon=self.config.rollout.max_new_tokens,
            )
            return self._loss(part, advantages[rows, : mask.shape[1]], weights, parts, sums)

        report = self.trainer.step(lambda rows=rows: loss_of(rows) for rows in mini)  # type: ignore[misc]
        metrics = {k: float(v) for k, v in all_reduce_sums(parts, self.device).items()}
        return metrics | {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "skipped": float(report.skipped),
        }

    def _loss(self, part: Rollouts, advantages: Tensor, weights: Tensor, parts: Sums, sums: Sums) -> Tensor:
        """Scalar loss of a micro-batch: sums over tokens under ``weights`` [b, T], which add up over the batch."""
        policy, device = self.config.policy, self.device
        logprobs, entropy = self._score(self.trainer.module, part)
        assert part.logprobs is not None, "policy.logprobs comes before policy.update"
        mask, old, weights = part.response_mask.to(device), part.logprobs.to(device), weights.to(device)
        logprobs = torch.where(mask, logprobs, old)
        surrogate, clipped = clipped_surrogate(
            logprobs,
            old,
            advantages.to(device),
            clip_low=policy.clip_low,
            clip_high=policy.clip_high,
            dual_clip=policy.dual_clip,
            is_weights=self._corrections(old, part),
        )
        loss = weighted_sum(surrogate, weights, mask)
        add_up(parts, {"surrogate": loss})
        if policy.entropy_coef:
            loss = loss - policy.entropy_coef * weighted_sum(entropy, weights, mask)
        ref = None if part.ref_logprobs is None else part.ref_logprobs.to(device)
        if ref is not None and policy.kl.where == "loss":
            loss = loss + policy.kl.coef * weighted_sum(kl_penalty(logprobs, ref, policy.kl.kind), weights, mask)
        found = policy_sums(logprobs.detach(), old, clipped, mask, ref_logprobs=ref, entropy=entropy.detach())
        add_up(sums, found)
        return loss

    def _corrections(self, old: Tensor, part: Rollouts) -> Tensor | None:
        """Importance weights [b, T] of tokens that the engine sampled, if asked for."""
        rollout = self.config.rollout
        if rollout.correction == "none":
            return None
        beyond: Literal["truncate", "mask"] = "truncate" if rollout.correction == "truncated" else "mask"
        floor = rollout.importance_floor if beyond == "mask" else 0.0
        return importance_weights(
            old, part.rollout_logprobs.to(old.device), rollout.importance_cap, beyond=beyond, floor=floor
        )


def _widen(x: Tensor, part: Rollouts, width: int) -> Tensor:
    """[b, t] -> [b, width] on the CPU, 0 off the response mask."""
    x = torch.where(part.response_mask, x.cpu(), 0.0)
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
