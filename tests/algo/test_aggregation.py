from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.aggregation import Aggregation, token_weights, weighted_sum

KINDS = get_args(Aggregation)
MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])
COUNTS = {"num_tokens": 4, "num_sequences": 2, "horizon": 8}


@pytest.mark.parametrize(
    ("kind", "long", "short"),
    [
        ("token_mean", 1 / 4, 1 / 4),
        ("seq_mean_token_mean", 1 / 6, 1 / 2),
        ("seq_mean_token_sum", 1 / 2, 1 / 2),
        ("seq_mean_token_sum_norm", 1 / 16, 1 / 16),
    ],
)
def test_weights_by_hand(kind: Aggregation, long: float, short: float) -> None:
    weights = token_weights(MASK, kind, **COUNTS)
    assert_close(weights, torch.tensor([[long, long, long, 0.0], [short, 0.0, 0.0, 0.0], [0.0] * 4]))
    assert not weights.requires_grad


def test_every_kind_is_the_same_mean_when_lengths_are_the_horizon() -> None:
    mask, x = torch.ones(3, 4, dtype=torch.bool), torch.randn(3, 4)
    for kind in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"):
        weights = token_weights(mask, kind, num_tokens=12, num_sequences=3, horizon=4)
        assert_close(weighted_sum(x, weights, mask), x.mean())


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_any_cut_gives_the_same_loss_and_gradient(
    lengths: list[int], cuts: list[int], kind: Aggregation, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(len(lengths), 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    counts = {"num_tokens": max(1, sum(lengths)), "num_sequences": max(1, sum(n > 0 for n in lengths)), "horizon": 7}

    def loss_and_gradient(edges: list[int]) -> tuple[Tensor, Tensor]:
        theta, total = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64)
        for start, end in zip([0, *edges], [*edges, len(lengths)], strict=True):
            width = max([1, *lengths[start:end]])  # every part is padded to its own longest row
            x, part = data[start:end, :width], mask[start:end, :width]
            loss = weighted_sum((theta * x).exp(), token_weights(part, kind, **counts), part)
            loss.backward()
            total += loss.detach()
        assert theta.grad is not None
        return total, theta.grad

    whole = loss_and_gradient([])
    parts = loss_and_gradient(sorted(min(c, len(lengths)) for c in cuts))
    assert_close(parts, whole)


def test_nan_on_padding_reaches_neither_value_nor_gradient() -> None:
    x = torch.where(MASK, 2.0, math.nan).requires_grad_()
    weights = token_weights(MASK, "token_mean", **COUNTS)
    loss = weighted_sum(x, torch.where(MASK, weights, math.nan), MASK)
    assert loss.item() == 2.0
    loss.backward()
    assert_close(x.grad, weights)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_sequences": 0}, "num_sequences"),
        ({"horizon": math.nan}, "horizon"),
        ({"kind": "mean"}, "token_mean"),
        ({"mask": MASK[0]}, "mask"),
    ],
)
def test_bad_arguments(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        token_weights(**({"mask": MASK, "kind": "token_mean"} | COUNTS | change))  # type: ignore[arg-type]


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="shapes"):
        weighted_sum(torch.zeros(3, 4), torch.zeros(3, 1), MASK)
