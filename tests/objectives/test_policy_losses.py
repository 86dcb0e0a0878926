"""GSPO and CISPO against independent float64 references, and the policy's objective around any loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.aggregation import token_weights, weighted_sum
from dvpo_service.algo.policy_loss import clipped_weight_loss, sequence_surrogate
from dvpo_service.objectives.policy import PolicyObjective
from dvpo_service.registry import policy_losses
from tests.builders import make_config, make_rollouts

LOW, HIGH = 0.1, 0.2
NAMES = ("ppo", "gspo", "cispo")


def batch(seed: int, rows: int = 4, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs with gradient, old ones, advantages, and a mask with a row of nothing and a gap inside another."""
    rng = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=rng, dtype=torch.float64) - 0.1
    logprobs = old + 0.3 * torch.randn(rows, width, generator=rng, dtype=torch.float64)
    advantages = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=rng)
    mask = torch.arange(width) < lengths[:, None]
    mask[0] = False
    if lengths[1] > 2:
        mask[1, 1] = False
    return logprobs.requires_grad_(), old, advantages, mask


def gspo_of_a_row(logprobs: list[float], old: list[float], advantages: list[float]) -> tuple[float, list[float]]:
    """Eq. 5 of arXiv 2507.18071 for one response, with its gradient by hand."""
    n = len(logprobs)
    s = math.exp(sum(p - o for p, o in zip(logprobs, old, strict=True)) / n)
    loss, gradient = 0.0, [0.0] * n
    for a in advantages:
        free, bounded = s * a, min(max(s, 1 - LOW), 1 + HIGH) * a
        loss -= min(free, bounded) / n
        if free <= bounded:  # else the clip holds, and there is no gradient
            gradient = [g - s * a / n / n for g in gradient]
    return loss, gradient


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_gspo_is_its_equation(seed: int) -> None:
    logprobs, old, advantages, mask = batch(seed)
    loss, _ = sequence_surrogate(logprobs, old, advantages, mask, clip_low=LOW, clip_high=HIGH)
    sequences = float(mask.any(1).sum())
    weights = token_weights(
        mask, "seq_mean_token_mean", num_tokens=float(mask.sum()), num_sequences=sequences, horizon=1.0
    )
    total = weighted_sum(loss, weights.double(), mask)
    total.backward()
    assert logprobs.grad is not None
    expected = size = 0.0
    for row in range(len(mask)):
        at = mask[row].nonzero().flatten().tolist()
        if not at:
            continue
        values: list[list[float]] = [x.detach()[row, at].tolist() for x in (logprobs, old, advantages)]
        row_loss, gradient = gspo_of_a_row(*values)
        expected += row_loss / sequences
        size += abs(row_loss) / sequences
        assert_close(
            logprobs.grad[row, at], torch.tensor(gradient, dtype=torch.float64) / sequences, rtol=1e-6, atol=1e-9
        )
    # The weights are float32: a row's loss is rounded in its own size, and rows of either sign may cancel.
    assert float(total.detach()) == pytest.approx(expected, rel=0, abs=1e-6 * size + 1e-9)
    assert (logprobs.grad[~mask] == 0).all()


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_cispo_is_its_equation(seed: int) -> None:
    logprobs, old, advantages, _ = batch(seed)
    loss, clipped = clipped_weight_loss(logprobs, old, advantages, clip_low=LOW, clip_high=HIGH)
    ratio = (logprobs.detach() - old).exp()
    weight = ratio.clamp(1 - LOW, 1 + HIGH)
    loss.sum().backward()
    assert_close(loss.detach(), -weight * advantages * logprobs.detach())
    assert_close(logprobs.grad, -weight * advantages)
    assert torch.equal(clipped, (ratio > 1 + HIGH) | (ratio < 1 - LOW))


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_loss_has_the_gradient_of_the_policy(name: str) -> None:
    """Before the first update of a batch r = 1, and all three are -A grad log p (GSPO: the mean over the response)."""
    _, old, advantages, mask = batch(3)
    advantages = advantages[:, :1].expand_as(advantages)  # one number a response, as outcome rewards give
    logprobs = old.clone().requires_grad_()
    made = policy_losses.load(name)(logprobs, old, advantages, mask, make_config("model").policy)
    (gradient,) = torch.autograd.grad(torch.where(mask, made[0], 0.0).sum(), logprobs)
    assert_close(gradient, torch.where(mask, -advantages, 0.0))
    assert not made[1][mask].any()


def objective(**policy: Any) -> PolicyObjective:
    return PolicyObjective(make_config("model", policy=policy))


def shares(objective: PolicyObjective, cuts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, added up over micro-batches."""
    rollouts = make_rollouts(seed=1)
    old = rollouts.rollout_logprobs
    rollouts = rollouts.with_(logprobs=old, ref_logprobs=old - 0.1)
    logprobs = (old + 0.2 * torch.sin(torch.arange(old.numel()).view_as(old))).requires_grad_()
    advantages = torch.cos(torch.arange(old.numel()).view_as(old).float())
    mask = rollouts.response_mask
    total = torch.zeros(())
    for rows in map(torch.tensor, cuts):
        part = rollouts.select(rows)
        width = part.response_mask.shape[1]
        loss, _, _ = objective.loss(
            logprobs[rows, :width],
            -logprobs[rows, :width],
            part,
            advantages[rows, :width],
            num_tokens=float(mask.sum()),
            num_sequences=float(mask.any(1).sum()),
        )
        total = total + loss
    (gradient,) = torch.autograd.grad(total, logprobs)
    return total.detach(), gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [{}, {"entropy_coef": 0.1, "kl": {"coef": 0.3}}], ids=["bare", "entropy and kl"])
def test_shares_of_micro_batches_add_up_to_the_whole(name: str, extra: dict[str, Any]) -> None:
    one = objective(loss=name, loss_agg="seq_mean_token_mean", **extra)
    whole, cut = shares(one, [list(range(16))]), shares(one, [[3, 0], [1, 2, 4, 5, 6, 15], list(range(7, 15))])
    assert_close(cut[0], whole[0])
    assert_close(cut[1], whole[1])


def test_kl_and_entropy_are_added_to_the_surrogate() -> None:
    bare, both = shares(objective(), [list(range(16))]), shares(objective(entropy_coef=0.5), [list(range(16))])
    rollouts = make_rollouts(seed=1)
    logprobs = rollouts.rollout_logprobs
    logprobs = logprobs + 0.2 * torch.sin(torch.arange(logprobs.numel()).view_as(logprobs))
    entropy = -logprobs[rollouts.response_mask].mean()
    assert_close(both[0], bare[0] - 0.5 * entropy)
