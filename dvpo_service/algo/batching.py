"""How a batch of sequences is cut: optimizer steps, then ranks, then forward passes.

The order depends on the seed and the step only, so that one rank and N ranks take the same
optimizer steps on the same sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_order(batch_size: int, *, seed: int, step: int) -> Tensor:
    """A permutation of ``range(batch_size)`` for this training step."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.randperm(batch_size, generator=generator)


def rank_micro_batches(
    batch_size: int, *, mini_size: int, micro_size: int, rank: int, world_size: int, seed: int, step: int
) -> list[list[Tensor]]:
    """Row indices by optimizer step and forward pass, for one rank.

    Every rank gets equally many micro-batches of equal size (FSDP's collectives run in lockstep),
    which needs ``world_size`` to divide ``mini_size`` and ``mini_size`` the batch.
    """
    if batch_size % mini_size or mini_size % world_size:
        raise ValueError(f"{batch_size} rows do not divide into mini-batches of {mini_size} on {world_size} ranks")
    minis = step_order(batch_size, seed=seed, step=step).split(mini_size)
    return [list(mini[rank::world_size].split(micro_size)) for mini in minis]
