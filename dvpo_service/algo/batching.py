"""How a batch of sequences is split: into optimizer steps, then over ranks, then into forward passes.

Which rows an optimizer step has depends on the seed and the step only, so that one rank and N ranks take the same
optimizer steps on the same sequences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def step_order(batch_size: int, *, seed: int, step: int) -> Tensor:
    """Return the permutation of ``range(batch_size)`` for this training step, [batch_size] int64."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.randperm(batch_size, generator=generator)


def rank_micro_batches(
    lengths: Tensor,
    *,
    mini_size: int,
    micro_size: int,
    max_tokens: int | None = None,
    packed: bool = False,
    rank: int,
    world_size: int,
    seed: int,
    step: int,
) -> list[list[Tensor]]:
    """Return one rank's row indices: a list per optimizer step, with a tensor per forward pass.

    Every rank gets equally many micro-batches of equally many rows, because FSDP's collectives run in lockstep. So
    ``world_size`` must divide ``mini_size``, and ``mini_size`` must divide the number of rows.

    Args:
      lengths: [B], tokens of each row.
      mini_size: rows of an optimizer step, over all ranks.
      micro_size: rows of a forward pass on one rank, at most.
      max_tokens: tokens of a forward pass on one rank, at most; padding counts unless ``packed``. A longer row has a
        forward pass of its own. If None, rows are not sorted by length, and only ``micro_size`` counts.
      packed: rows are laid end to end.

    Raises:
      ValueError: when the sizes do not divide.
    """
    batch_size = len(lengths)
    if batch_size % mini_size or mini_size % world_size:
        raise ValueError(f"{batch_size} rows do not divide into mini-batches of {mini_size} on {world_size} ranks")
    minibatches = step_order(batch_size, seed=seed, step=step).split(mini_size)
    if max_tokens is None:
        return [list(rows[rank::world_size].split(micro_size)) for rows in minibatches]
    return [
        [shares[rank] for shares in by_tokens(rows, lengths, max_tokens, micro_size, world_size, packed=packed)]
        for rows in minibatches
    ]


def by_tokens(
    rows: Tensor, lengths: Tensor, max_tokens: int, micro_size: int, world_size: int, *, packed: bool
) -> Iterator[list[Tensor]]:
    """Yield the micro-batches of all ranks at once, [c] rows for each rank, the longest rows first.

    Ranks in lockstep wait for the slowest, so what they do at the same time is of similar length: neighbours in the
    order of length. That also keeps padding short.

    Args:
      rows: the rows of an optimizer step; ``world_size`` divides their number.
      lengths: [B], tokens of each row of the batch.
    """
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    while len(rows):
        longest = lengths[rows[::world_size]]  # in each deal of a row to every rank
        tokens = longest.cumsum(0) if packed else longest[0] * torch.arange(1, len(longest) + 1)
        count = min(max(1, int((tokens <= max_tokens).sum())), micro_size)
        yield _dealt(rows[: count * world_size].view(count, world_size), lengths)
        rows = rows[count * world_size :]


def _dealt(deals: Tensor, lengths: Tensor) -> list[Tensor]:
    """Give every rank one row of each deal [c, ranks], the longest to the rank with the fewest tokens so far."""
    shares = torch.empty_like(deals)
    load = torch.zeros(deals.shape[1], dtype=lengths.dtype)
    for deal, share in zip(deals, shares, strict=True):
        share[load.argsort(stable=True)] = deal
        load += lengths[share]
    return list(shares.T)
