"""How a batch of sequences is split: into optimizer steps, then over ranks, then into forward passes.

The order depends on the seed and the step only, so that one rank and N ranks take the same optimizer steps on the same
sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_order(batch_size: int, *, seed: int, step: int) -> Tensor:
    """Return the permutation of ``range(batch_size)`` for this training step, [batch_size] int64."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.randperm(batch_size, generator=generator)


def rank_micro_batches(
    batch_size: int, *, mini_size: int, micro_size: int, rank: int, world_size: int, seed: int, step: int
) -> list[list[Tensor]]:
    """Return one rank's row indices: a list per optimizer step, with a tensor per forward pass.

    Every rank gets equally many micro-batches of equal size, because FSDP's collectives run in lockstep. So
    ``world_size`` must divide ``mini_size``, and ``mini_size`` must divide ``batch_size``.

    Args:
      mini_size: rows of an optimizer step, over all ranks.
      micro_size: rows of a forward pass on one rank; the last pass of a step may have fewer.

    Raises:
      ValueError: when the sizes do not divide.
    """
    if batch_size % mini_size or mini_size % world_size:
        raise ValueError(f"{batch_size} rows do not divide into mini-batches of {mini_size} on {world_size} ranks")
    minibatches = step_order(batch_size, seed=seed, step=step).split(mini_size)
    return [list(rows[rank::world_size].split(micro_size)) for rows in minibatches]
