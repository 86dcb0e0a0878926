"""A run's position in its data: each epoch is a seeded permutation in which every prompt occurs once."""

from __future__ import annotations

import hashlib
from typing import TypedDict

import torch

from dvpo_service.errors import CheckpointError


class CursorState(TypedDict):
    """A cursor's position: ``offset`` prompts of epoch ``epoch`` were taken, 0 <= offset < num_prompts."""

    seed: int
    num_prompts: int
    epoch: int
    offset: int


class PromptCursor:
    """Gives prompt indices in an order that depends only on ``num_prompts``, ``seed`` and the epoch."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, is {num_prompts}")
        self.num_prompts = num_prompts
        self.seed = seed
        self._go_to(epoch=0, offset=0)

    @property
    def epoch(self) -> int:
        """The number of completed epochs: every index was given this many times, or once more."""
        return self._epoch

    def take(self, n: int) -> list[int]:
        """Return the next ``n`` indices. They may span epochs, and then the same index may occur twice."""
        if n < 0:
            raise ValueError(f"n must not be negative, is {n}")
        taken: list[int] = []
        while len(taken) < n:
            part = self._order[self._offset : self._offset + n - len(taken)]
            taken += part
            self._offset += len(part)
            if self._offset == self.num_prompts:
                self._go_to(self._epoch + 1, 0)
        return taken

    def state_dict(self) -> CursorState:
        """Return the position as plain values, ready for JSON."""
        return CursorState(seed=self.seed, num_prompts=self.num_prompts, epoch=self._epoch, offset=self._offset)

    def load_state_dict(self, state: CursorState) -> None:
        """Go to a saved position.

        Raises:
          CheckpointError: the state is of other data or another seed, or is malformed.
        """
        keys = CursorState.__annotations__
        if set(state) != set(keys) or not all(type(v) is int for v in state.values()):
            raise CheckpointError(f"cursor state {dict(state)}: expected whole numbers {', '.join(keys)}")
        if state["num_prompts"] != self.num_prompts:
            raise CheckpointError(
                f"the checkpoint was made with {state['num_prompts']} training prompts, the data now has "
                f"{self.num_prompts}; restore the data, or start a new run"
            )
        if state["seed"] != self.seed:
            raise CheckpointError(
                f"the checkpoint was made with data seed {state['seed']}, the config now has {self.seed}; "
                "restore the seed, or start a new run"
            )
        if state["epoch"] < 0 or not 0 <= state["offset"] < self.num_prompts:
            raise CheckpointError(f"cursor state {dict(state)}: epoch or offset is out of range")
        self._go_to(state["epoch"], state["offset"])

    def _go_to(self, epoch: int, offset: int) -> None:
        digest = hashlib.blake2b(f"{self.seed}:{epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        self._order: list[int] = torch.randperm(self.num_prompts, generator=generator).tolist()
        self._epoch, self._offset = epoch, offset
