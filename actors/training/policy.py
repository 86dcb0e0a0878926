"""One rank of the policy pool: log-probs, the update, weights out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.cluster.pool import Rendezvous
from actors.training.process_group import add_up, all_reduce, all_reduce_sums, init_process_group
from actors.training.trainer import Trainer, UpdateMetrics
from actors.training.worker import TrainerWorker
from dvpo_service.algo.diagnostics import policy_metrics
from dvpo_service.config import Backend, Config
from dvpo_service.models.fixed_sequences import FixedSequences, fixed_token_ids
from dvpo_service.models.load import load_causal_lm, load_tokenizer
from dvpo_service.models.lora import adapters_off, add_adapter
from dvpo_service.models.policy import PolicyModel
from dvpo_service.models.policy_folder import write_policy
from dvpo_service.models.sharded_load import in_turns, load_sharded
from dvpo_service.models.sharding import all_ranks, shard
from dvpo_service.objectives.policy import PolicyObjective
from dvpo_service.runs.storage import written_locally
from dvpo_service.types import Metrics, Rollouts

if TYPE_CHECKING:
    from actors.weights.transfer import EngineClient

Sums = dict[str, Tensor]


@dataclass
class RankLogprobs:
    """What a rank computed for its sequences: their ``rows`` [b] in the batch, log-probs [b, T] on the CPU."""

    rows: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None


class PolicyWorker(TrainerWorker):
    """Scores and trains the policy on this rank's sequences. Every rank calls every method in the same order."""

    def __init__(self, config: Config, model_path: str, meet: Rendezvous):
        self.config, self.meet, self.model_path = config, meet, model_path
        self.device = init_process_group(meet)
        torch.manual_seed(config.trainer.seed)
        module: Any = self._load(torch.float32, checkpointing=config.policy.gradient_checkpointing)
        minibatches = config.batch_size // (config.policy.mini_batch_size or config.batch_size)
        steps = config.trainer.num_steps * config.policy.epochs * minibatches
        self.trainer = Trainer(
            module, config.policy.optim, total_steps=steps, defer_reduction=config.policy.defer_gradient_reduction
        )
        self.objective = PolicyObjective(config)
        self.reference: Any = None
        if config.policy.kl.coef > 0 and not config.policy.lora:
            # No optimizer updates it, so it is kept in the precision of the computation.
            self.reference = self._load(getattr(torch, config.model.dtype), checkpointing=False).requires_grad_(False)
        self.transfer: Any = None
        self.membership: Any = None  # the engines that the transfer reaches
        if not config.cluster.in_process:
            # vLLM's transfer takes seconds to import. Do it now, while the engines start, and not at the first push.
            from actors.weights import cpu_transfer  # noqa: F401

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, step: int) -> RankLogprobs:
        """Return log-probs of the sampled tokens before the update, and under the reference if there is one."""
        rows: list[Tensor] = []
        logprobs: list[Tensor] = []
        reference: list[Tensor] = []
        width = rollouts.response_mask.shape[1]
        for minibatch in self.split(self.config.policy, rollouts, step):
            for index in minibatch:
                part = rollouts.select(index)
                rows.append(index)
                logprobs.append(_widen(self._score(self.trainer.module, part)[0], part, width))
                if self.config.policy.kl.coef > 0:
                    reference.append(_widen(self._reference_score(part), part, width))
        return RankLogprobs(torch.cat(rows), torch.cat(logprobs), torch.cat(reference) if reference else None)

    def _reference_score(self, part: Rollouts) -> Tensor:
        """Return log-probs [b, t] under the reference: a frozen copy, or the policy with its adapters off."""
        if self.reference is not None:
            return self._score(self.reference, part)[0]
        with adapters_off(self.trainer.module):
            return self._score(self.trainer.module, part)[0]

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> Tensor:
        """Return log-probs [B, T] of a few responses in one forward pass. Every rank scores all of them. Collective."""
        return _widen(self._score(self.trainer.module, rollouts)[0], rollouts, rollouts.response_mask.shape[1])

    def update(self, rollouts: Rollouts, changes: dict[str, Tensor], advantages: Tensor, step: int) -> Metrics:
        """Take the optimizer steps of ``policy.epochs`` over the batch, and return metrics over all ranks.

        Args:
          rollouts: the step's batch.
          changes: fields of the batch that later stages set, by name; ``logprobs`` is among them.
          advantages: [B, T] as the loss takes them.
          step: number of the step.
        """
        rollouts = rollouts.with_(**changes)
        metrics = UpdateMetrics("policy", "loss")
        sums: Sums = {}
        for _ in range(self.config.policy.epochs):
            for minibatch in self.split(self.config.policy, rollouts, step):
                shares: Sums = {}
                report = self.trainer.step(self._losses(rollouts, advantages, minibatch, shares, sums))
                metrics.add(report, all_reduce_sums(shares, self.device))
        return metrics.result(self.trainer.lr) | policy_metrics(all_reduce_sums(sums, self.device))

    def send_weights(self, client: EngineClient, backend: Backend) -> dict[int, str]:
        """Push the current weights to the client's engines, and return when they hold them. Collective.

        If the engines are not the same as at the last push, it joins their weight transfer first.

        Returns:
          The engines lost on the way, by number, with the cause; complete on rank 0 only.
        """
        from actors.weights.transfer import connect

        if self.membership != client.membership:
            if self.transfer is not None:
                self.transfer.shutdown()
            dtype = getattr(torch, self.config.model.dtype)
            self.transfer = connect(self.trainer.module.backbone, client, backend, self.meet.rank, dtype)
            self.membership = client.membership
        self.transfer.client = client
        self.transfer.send_weights()
        return client.lost

    def export(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder. Collective; rank 0 writes, a weight at a time."""
        if self.meet.rank > 0:
            self._export(None)
            return
        with written_locally(folder) as local:
            self._export(Path(local))

    def _export(self, folder: Path | None) -> None:
        lm: Any = self.trainer.module.backbone
        write_policy(lm, folder, lora=self.config.policy.lora, base=self.model_path)
        tokenizer = load_tokenizer(self.model_path, trust_remote_code=self.config.model.trust_remote_code)
        sequences = fixed_token_ids(lm.config, tokenizer)
        fixed = FixedSequences(sequences, [self._sequence_logprobs(ids) for ids in sequences], self.config.model.dtype)
        if folder is not None:
            tokenizer.save_pretrained(folder)
            fixed.write(folder)

    @torch.no_grad()
    def _sequence_logprobs(self, ids: list[int]) -> list[float]:
        """Return the log-probs of the tokens after the first, at temperature 1. Collective."""
        module = self.trainer.module
        temperature, module.temperature = module.temperature, 1.0
        tokens, first, length = (torch.tensor(x, device=self.device) for x in ([ids], [1], [len(ids)]))
        logprobs, _ = module(tokens, first, length, len(ids) - 1, with_entropy=False)
        module.temperature = temperature
        return logprobs[0].tolist()

    def _load(self, dtype: torch.dtype, *, checkpointing: bool) -> Any:
        mesh = all_ranks(self.device)

        def build(lm: Any) -> Any:
            if lora := self.config.policy.lora:
                lm = add_adapter(lm, lora, seed=self.config.trainer.seed)
            return shard(
                PolicyModel(lm, temperature=self.config.rollout.temperature, packing=self.config.policy.packing),
                mesh,
                bfloat16=self.config.model.dtype == "bfloat16",
                checkpointing=checkpointing,
            )

        trust = self.config.model.trust_remote_code
        if self.config.policy.lora:  # the names of the files' weights are not those of a model with adapters
            return in_turns(lambda: build(load_causal_lm(self.model_path, dtype=dtype, trust_remote_code=trust)), mesh)
        return load_sharded(self.model_path, build, mesh, head=True, dtype=dtype, trust_remote_code=trust)

    def _score(self, module: Any, part: Rollouts, *, with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return log-probs and entropies [b, T] of the responses in ``part``; None in place of entropies not wanted."""
        return module(
            part.tokens.to(self.device),
            part.prompt_lens.to(self.device),
            (part.prompt_lens + part.response_lens).to(self.device),
            part.response_mask.shape[1],
            with_entropy=with_entropy,
        )

    def _losses(
        self, rollouts: Rollouts, advantages: Tensor, minibatch: list[Tensor], shares: Sums, sums: Sums
    ) -> list[Callable[[], Tensor]]:
        """Return a function for each micro-batch that computes its loss, and adds its measurements to both sums."""
        masks = [rollouts.response_mask[rows] for rows in minibatch]
        counts = torch.tensor([[m.sum(), m.any(1).sum()] for m in masks], dtype=torch.float64).sum(0)
        tokens, sequences = all_reduce(counts, self.device).clamp(min=1).tolist()

        def loss(rows: Tensor) -> Tensor:
            part = rollouts.select(rows).to(self.device)
            logprobs, entropy = self._score(self.trainer.module, part, with_entropy=True)
            assert entropy is not None
            total, share, summed = self.objective.loss(
                logprobs,
                entropy,
                part,
                advantages[rows, : part.response_mask.shape[1]].to(self.device),
                num_tokens=tokens,
                num_sequences=sequences,
            )
            add_up(shares, share)
            add_up(sums, summed)
            return total

        return [partial(loss, rows) for rows in minibatch]


def _widen(x: Tensor, part: Rollouts, width: int) -> Tensor:
    """Pad [b, t] to [b, width], on the CPU; positions outside the response mask are 0."""
    x = torch.where(part.response_mask, x.cpu(), 0.0)
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
