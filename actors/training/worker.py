"""What the two kinds of rank have in common: a trainer, and its checkpoints."""

from __future__ import annotations

from actors.training.trainer import Trainer
from dvpo_service.runs.integrity import Files


class TrainerWorker:
    """A rank that trains a module. Every rank calls every method in the same order."""

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
