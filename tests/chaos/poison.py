"""Within a trainer rank: one optimizer step whose gradients are NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def poison(rank: Any) -> None:
    """The next optimizer step of the rank (a worker) has a loss that is NaN, as from a bad batch."""
    trainer = rank.trainer
    step = trainer.step

    def once(losses: Iterable[Callable[[], Tensor]]) -> Any:
        trainer.step = step
        return step([lambda loss=loss: loss() * float("nan") for loss in losses])

    trainer.step = once
