"""Make one optimizer step of a trainer rank have NaN gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def poison(rank: Any) -> None:
    """Make the loss of the rank's next optimizer step NaN, as from a bad batch. ``rank`` is the worker."""
    trainer = rank.trainer
    step = trainer.step

    def once(losses: Iterable[Callable[[], Tensor]]) -> Any:
        trainer.step = step
        return step([lambda loss=loss: loss() * float("nan") for loss in losses])

    trainer.step = once
