"""Micro-batches by tokens: every row once, ranks in lockstep, within the budget, little padding and waiting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpo_service.algo.batching import rank_micro_batches

CAP = 8192


def split(lengths: Tensor, world: int, **sizes: int | bool | None) -> list[list[list[Tensor]]]:
    """Return all ranks' micro-batches."""
    ranks = range(world)
    return [rank_micro_batches(lengths, rank=r, world_size=world, seed=0, step=1, **sizes) for r in ranks]  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 60),
    st.booleans(),
    st.data(),
)
def test_every_row_once_equal_counts_within_the_budget(
    world: int, per_rank: int, steps: int, micro: int, budget: int, packed: bool, data: st.DataObject
) -> None:
    mini = world * per_rank
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 40), min_size=mini * steps, max_size=mini * steps)))
    sizes = {"mini_size": mini, "micro_size": micro}
    ranks = split(lengths, world, **sizes, max_tokens=budget, packed=packed)
    plain = split(lengths, world, **sizes)
    for step in range(steps):
        mine = torch.cat([rows for rank in ranks for rows in rank[step]])
        assert sorted(mine.tolist()) == sorted(torch.cat([rows for rank in plain for rows in rank[step]]).tolist()), (
            "an optimizer step has the same rows, whatever the budget"
        )
        shapes = [[len(rows) for rows in rank[step]] for rank in ranks]
        assert all(shape == shapes[0] for shape in shapes)
        assert max(shapes[0]) <= micro
        for rank in ranks:
            for rows in rank[step]:
                tokens = int(lengths[rows].sum() if packed else lengths[rows].max() * len(rows))
                assert tokens <= budget or len(rows) == 1
    every = torch.cat([rows for rank in ranks for step in rank for rows in step])
    assert sorted(every.tolist()) == list(range(len(lengths)))


def work(lengths: Tensor, ranks: list[list[list[Tensor]]], *, packed: bool) -> float:
    """Return the tokens for which the ranks are busy or wait for the slowest, over the tokens that there are."""
    waited = 0
    for micro_batches in zip(*(rank[0] for rank in ranks), strict=True):
        tokens = [int(lengths[m].sum() if packed else lengths[m].max() * len(m)) for m in micro_batches]
        waited += max(tokens) * len(tokens)
    return waited / int(lengths.sum())


@pytest.mark.parametrize(("packed", "bound"), [(False, 1.15), (True, 1.05)])
def test_little_padding_and_little_waiting(packed: bool, bound: float) -> None:
    """16 ranks, 512 lognormal lengths of mean 2.6k. Without a budget: 3.1 times the work that there is."""
    spread = 0.9
    normal = torch.randn(512, generator=torch.Generator().manual_seed(0))
    lengths = (normal * spread + math.log(2600) - spread**2 / 2).exp().clamp(1, CAP).long()
    sizes = {"mini_size": 512, "micro_size": 4}
    assert work(lengths, split(lengths, 16, **sizes), packed=False) > 2.5
    assert work(lengths, split(lengths, 16, **sizes, max_tokens=2 * CAP, packed=packed), packed=packed) < bound


def test_rows_must_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        split(torch.ones(10), 2, mini_size=4, micro_size=1)
