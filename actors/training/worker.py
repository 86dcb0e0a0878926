"""What the two kinds of rank have in common: a trainer, its checkpoints, and the split of a batch."""

from __future__ import annotations

from torch import Tensor

from actors.cluster.pool import Rendezvous
from actors.training.trainer import Trainer
from dvpo_service.algo.batching import rank_micro_batches
from dvpo_service.config import Config
from dvpo_service.config.pools import TrainerPool
from dvpo_service.runs.integrity import Files
from dvpo_service.types import Rollouts


class TrainerWorker:
    """A rank that trains a module. Every rank calls every method in the same order."""

    config: Config
    meet: Rendezvous
    trainer: Trainer

    def save(self, folder: str) -> None:
        """See ``Trainer.save``."""
        self.trainer.save(folder)

    def saved(self, wait: bool) -> Files | None:
        """See ``Trainer.saved``."""
        return self.trainer.saved(wait=wait)

    def load(self, folder: str) -> None:
        """See ``Trainer.load``."""
        self.trainer.load(folder)

    def split(self, pool: TrainerPool, rollouts: Rollouts, step: int) -> list[list[Tensor]]:
        """Return this rank's rows by minibatch (an optimizer step) and micro-batch (a forward pass)."""
        return rank_micro_batches(
            rollouts.prompt_lens + rollouts.response_lens,
            mini_size=pool.mini_batch_size or len(rollouts),
            micro_size=pool.micro_batch_size,
            max_tokens=pool.max_tokens_per_micro_batch,
            packed=pool.packing,
            rank=self.meet.rank,
            world_size=self.meet.world_size,
            seed=self.config.trainer.seed,
            step=step,
        )
