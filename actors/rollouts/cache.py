"""Scored rollouts kept in memory, for steps that a fault makes the trainers do again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields

from torch import Tensor

from dvpo_service.data.cursor import CursorState
from dvpo_service.types import Generated, Rollouts


@dataclass(frozen=True)
class CachedBatch:
    """A step's batch, the prompts drawn for it, and where the cursor stood before and after."""

    generated: Generated
    prompts: list[int]
    failed: int
    before: CursorState
    after: CursorState


class RolloutCache:
    """The newest batches that fit into ``gib`` GiB; the oldest are dropped first.

    A batch sampled for step j came from weights of version j. When the trainers go back and come to
    step j again they hold version j again, so the batch is as fresh as it was.
    """

    def __init__(self, gib: float):
        self.limit = int(gib * 2**30)
        self.batches: OrderedDict[int, CachedBatch] = OrderedDict()

    def put(self, step: int, batch: CachedBatch) -> None:
        """Keep the batch of ``step``, in place of an earlier one."""
        self.batches.pop(step, None)
        self.batches[step] = batch
        while self.batches and sum(size(b.generated.rollouts) for b in self.batches.values()) > self.limit:
            self.batches.popitem(last=False)

    def drop_after(self, step: int) -> None:
        """Drop the batches of later steps than ``step``."""
        for later in [s for s in self.batches if s > step]:
            del self.batches[later]

    def find(self, step: int, cursor: CursorState) -> CachedBatch | None:
        """Return the batch of ``step``, if the prompts due now are those that it was made from."""
        batch = self.batches.get(step)
        return batch if batch and batch.before == cursor else None


def size(rollouts: Rollouts) -> int:
    """Return the bytes of a batch's tensors."""
    values = (getattr(rollouts, f.name) for f in fields(rollouts))
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
