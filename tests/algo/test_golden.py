"""Terms, totals, gradients and targets against values that were computed independently of this code, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from algo_reference import calibrated_spec, paper_spec
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.advantages import distributional_gae, scalar_gae
from dvpo_service.algo.critic_loss import critic_loss
from dvpo_service.algo.loss_spec import TERMS, CriticLossSpec
from dvpo_service.algo.quantiles import lower_tail_variance

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
FORMS = {"paper": (paper_spec, 1.0), "calibrated": (calibrated_spec, 0.05)}


def tensor(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def over_ties(grad: Tensor, z: Tensor) -> Tensor:
    """Return the gradient summed over the tied atoms of a head.

    Which of two tied atoms a sort puts first is arbitrary, and so are their single gradients; their sum is not.
    """
    same = z[..., :, None] == z[..., None, :]
    return (same * grad[..., None, :]).sum(-1)


def kink_of_the_tie_row(z: Tensor, spec: CriticLossSpec) -> Tensor:
    """Return the slope that the golden gradient has in addition to ours, in the row with ties.

    Token (0, 1) of that row has var_low(q) = var_low(y) = 0.14 exactly. This is the kink of Eq. 8, where rounding picks
    the subgradient: the golden gradient has the slope of one side, and ours has 0.
    """
    q = z.sort(dim=-1).values.mean(-2)
    (slope,) = torch.autograd.grad(spec.weights["shape"] * lower_tail_variance(q[0, 1], spec.alpha), z)
    return slope


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", GOLDEN["losses"], ids=lambda row: row["kind"])
def test_losses(row: dict[str, Any], form: str) -> None:
    make_spec, delta = FORMS[form]
    z, mask, expected = tensor(row["z"]).requires_grad_(), tensor(row["mask"]).bool(), row[form]
    spec = make_spec(alpha=row["alpha"], beta=row["beta"])
    loss = critic_loss(z, tensor(row["y"]), mask, spec, delta=delta, denominator=float(mask.sum()))
    loss.total.backward()
    for name in TERMS:
        assert loss.raw[name].item() == pytest.approx(expected["terms"][name], rel=1e-9, abs=1e-15), name
    assert loss.total.item() == pytest.approx(expected["total"], rel=1e-9)
    assert z.grad is not None
    grad, golden = z.grad, tensor(expected["grad"])
    if row["kind"] == "ties":
        grad = grad + kink_of_the_tie_row(z, spec) / mask.sum()
        assert_close(over_ties(grad, z.detach()), over_ties(golden, z.detach()), rtol=1e-9, atol=1e-13)
    else:
        assert_close(grad, golden, rtol=1e-9, atol=1e-13)
        assert grad.abs().sum().item() == pytest.approx(expected["grad_abs_sum"], rel=1e-9)


@pytest.mark.parametrize("row", GOLDEN["gae"], ids=lambda row: f"gamma{row['gamma']}-lambda{row['lam']}")
def test_gae(row: dict[str, Any]) -> None:
    rewards, values, z_end = tensor(row["rewards"]), tensor(row["values"]), tensor(row["z_end"])
    mask = tensor(row["mask"]).bool()
    targets = distributional_gae(rewards, values, mask, z_end, row["gamma"], row["lam"])
    assert_close(targets, tensor(row["targets"]), rtol=1e-9, atol=1e-12)
    advantages, _ = scalar_gae(rewards, values.mean(-1), mask, z_end.mean(-1), row["gamma"], row["lam"])
    assert_close(advantages, tensor(row["advantages"]), rtol=1e-9, atol=1e-12)
