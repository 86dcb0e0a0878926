from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from dvpo_service.algo.masks import masked_mean, masked_sum
from dvpo_service.algo.policy_loss import (
    clipped_surrogate,
    entropy,
    importance_weights,
    kl_penalty,
    token_logprobs,
)


def test_token_logprobs_and_entropy() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]]))
    assert_close(token_logprobs(logits, torch.tensor([[1, 0]])), torch.tensor([[math.log(0.25), 0.0]]))
    assert_close(entropy(logits), torch.tensor([[1.5 * math.log(2), 0.0]]))
    logits.requires_grad_()
    entropy(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    big = (torch.randn(1, 2, 50) * 100).bfloat16()
    assert token_logprobs(big, torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float32
    assert entropy(big.double()).dtype == torch.float64


def test_surrogate_by_hand() -> None:
    ratio = torch.tensor([[1.0, 1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0]])
    logprobs = ratio.log().requires_grad_()
    loss, clipped = clipped_surrogate(logprobs, torch.zeros_like(ratio), advantages, clip_low=0.2, clip_high=0.28)
    assert_close(loss, torch.tensor([[-2.0, -2.56, 3.0, -1.0, 1.6]]))
    assert clipped.tolist() == [[False, True, False, False, True]]
    loss.sum().backward()
    assert_close(logprobs.grad, torch.tensor([[-2.0, 0.0, 3.0, -1.0, 0.0]]))


def test_surrogate_weights_and_overflow() -> None:
    logprobs = torch.tensor([[0.0, 200.0, -200.0]], requires_grad=True)
    loss, _ = clipped_surrogate(
        logprobs,
        torch.zeros(1, 3),
        torch.tensor([[1.0, -1.0, 1.0]]),
        clip_low=0.2,
        clip_high=0.2,
    )
    loss = loss * torch.tensor([[0.5, 1.0, 1.0]])
    loss.sum().backward()
    assert loss[0, 0].item() == -0.5
    assert loss.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    with pytest.raises(ValueError, match="clip"):
        clipped_surrogate(logprobs, logprobs, logprobs, clip_low=1.5, clip_high=0.2)


def test_kl_estimators_against_closed_form() -> None:
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    r = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (p * (p / r).log()).sum()
    expected = {kind: (p * kl_penalty(p.log(), r.log(), kind)).sum() for kind in ("k1", "k2", "k3")}
    assert_close(expected["k1"], exact)
    assert_close(expected["k3"], exact)
    assert_close(expected["k2"], (p * (p / r).log().square() / 2).sum())
    assert (kl_penalty(p.log(), r.log(), "k3") >= 0).all()
    assert kl_penalty(torch.tensor(-500.0), torch.tensor(0.0), "k3").isfinite()
    with pytest.raises(ValueError, match="k1"):
        kl_penalty(p, r, "k4")  # type: ignore[arg-type]


def test_dual_clip_by_hand() -> None:
    """With c = 3 the loss of a token with A < 0 stops at -3 A; other tokens and PPO's clip are unchanged."""
    ratio = torch.tensor([[1.5, 0.5, 5.0, 2.0, 5.0]])
    advantages = torch.tensor([[2.0, -2.0, -2.0, -2.0, 0.0]])
    logprobs = ratio.log().requires_grad_()
    loss, clipped = clipped_surrogate(
        logprobs, torch.zeros_like(ratio), advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    assert_close(loss, torch.tensor([[-2.56, 1.6, 6.0, 4.0, 0.0]]))
    assert clipped.tolist() == [[True, True, True, False, False]]
    loss.sum().backward()
    assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, 0.0, 4.0, 0.0]]))
    for bound in (1.0, math.nan):
        with pytest.raises(ValueError, match="dual clip"):
            clipped_surrogate(logprobs, logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=bound)


def test_dual_clip_bounds_what_the_clip_does_not() -> None:
    logprobs = torch.tensor([[200.0]], requires_grad=True)
    bad = torch.tensor([[-1.0]])
    free, _ = clipped_surrogate(logprobs, torch.zeros(1, 1), bad, clip_low=0.2, clip_high=0.2)
    held, clipped = clipped_surrogate(logprobs, torch.zeros(1, 1), bad, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert free.item() > 1e8
    assert held.item() * 0.5 == 1.5
    assert clipped.all()


def test_importance_weights_are_capped_and_detached() -> None:
    proximal = torch.log(torch.tensor([[1.0, 3.0, 0.5]])).requires_grad_()
    weights = importance_weights(proximal, torch.zeros(1, 3), cap=2.0)
    assert_close(weights, torch.tensor([[1.0, 2.0, 0.5]]))
    assert not weights.requires_grad
    assert importance_weights(torch.tensor([[900.0]]), torch.tensor([[0.0]]), cap=2.0).item() == 2.0
    for cap, floor, match in ((0.0, 0.0, "cap"), (2.0, 2.5, "floor"), (2.0, -0.1, "floor")):
        with pytest.raises(ValueError, match=match):
            importance_weights(proximal, proximal, cap, floor=floor)


def test_masked_importance_weights_leave_tokens_out_on_both_sides() -> None:
    proximal = torch.log(torch.tensor([[1.0, 3.0, 0.5, 0.25, 1.5]])).requires_grad_()
    rollout = torch.zeros(1, 5)
    masked = importance_weights(proximal, rollout, 2.0, beyond="mask", floor=0.4)
    assert_close(masked, torch.tensor([[1.0, 0.0, 0.5, 0.0, 1.5]]))
    assert not masked.requires_grad
    assert_close(importance_weights(proximal, rollout, 2.0, beyond="mask")[0, 3], torch.tensor(0.25))
    assert_close(importance_weights(proximal, rollout, 2.0, floor=0.4)[0, 3], torch.tensor(0.25))
    with pytest.raises(ValueError, match="drop"):
        importance_weights(proximal, rollout, 2.0, beyond="drop")  # type: ignore[arg-type]


def test_masked_reductions() -> None:
    x = torch.tensor([[1.0, math.nan], [3.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_sum(x, mask).item() == 4.0
    masked_mean(x, mask, 8).backward()
    assert_close(x.grad, torch.tensor([[0.125, 0.0], [0.125, 0.0]]))
    with pytest.raises(ValueError, match="denominator"):
        masked_mean(x, mask, 0)
    with pytest.raises(ValueError, match="shape"):
        masked_sum(x, mask[:1])


@pytest.mark.parametrize("gap", [0.5, 19.0, 21.0, 40.0])
def test_k3_never_pushes_away_from_the_reference(gap: float) -> None:
    """The policy's log-prob is ``gap`` below the reference's: the penalty's gradient is not positive, however far."""
    logprobs = torch.tensor([[-gap]], dtype=torch.float64, requires_grad=True)
    kl_penalty(logprobs, torch.zeros(1, 1, dtype=torch.float64), "k3").sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() <= 0.0
    if gap < 20:
        assert logprobs.grad.item() == pytest.approx(1 - math.exp(gap))
