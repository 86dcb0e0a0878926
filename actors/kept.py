"""Scored rollouts kept in memory, for steps that a fault makes the trainers do again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields

from torch import Tensor

from dvpo_service.data.cursor import CursorState
from dvpo_service.types import Generated, Rollouts


@dataclass(frozen=True)
class Draw:
    """A step's batch, the prompts drawn for it, and where the cursor stood before and after."""

    generated: Generated
    prompts: list[int]
    failed: int
    before: CursorState
    after: CursorState


class KeptRollouts:
    """The newest draws that fit into ``gib``; the oldest leave first.

    A batch sampled for step j came from weights of version j. When the trainers go back and come to
    step j again they hold version j again, so the batch is as fresh as it was.
    """

    def __init__(self, gib: float):
        self.limit = int(gib * 2**30)
        self.draws: OrderedDict[int, Draw] = OrderedDict()

    def put(self, step: int, draw: Draw) -> None:
        self.draws.pop(step, None)
        self.draws[step] = draw
        while self.draws and sum(size(d.generated.rollouts) for d in self.draws.values()) > self.limit:
            self.draws.popitem(last=False)

    def drop_after(self, step: int) -> None:
        """What was drawn for later steps than ``step``."""
        for later in [s for s in self.draws if s > step]:
            del self.draws[later]

    def find(self, step: int, cursor: CursorState) -> Draw | None:
        """The draw of ``step``, if the prompts due now are those that it was made from."""
        draw = self.draws.get(step)
        return draw if draw and draw.before == cursor else None


def size(rollouts: Rollouts) -> int:
    """Bytes of a batch's tensors."""
    values = (getattr(rollouts, f.name) for f in fields(rollouts))
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
