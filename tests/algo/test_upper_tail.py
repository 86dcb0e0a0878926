"""Why the calibrated form needs Eq. 6 in addition to Eq. 8 (docs/ablation), on a tabular critic of a short chain.

The robust form's Eq. 8 does not need it.
"""

from __future__ import annotations

import torch

from dvpo_service.algo.advantages import mixture_targets
from dvpo_service.algo.critic_loss import critic_loss
from dvpo_service.config import AlgorithmConfig

T, M, B = 3, 20, 64


def upper_tail_at_the_start(*removed: str, form: str = "calibrated") -> float:
    """Return the mean of the top tenth of the atoms at the first token, after training.

    The only reward is a coin at the end of the chain.
    """
    weights = {f"ablate_{term}": True for term in removed}
    config = AlgorithmConfig.model_validate({"form": form, "dvpo_loss_weights": weights})
    atoms = torch.nn.Parameter(torch.linspace(0, 1, M).repeat(T, 1, 1))
    optimizer = torch.optim.Adam([atoms], lr=2e-2)
    rng, mask = torch.Generator().manual_seed(0), torch.ones(B, T, dtype=torch.bool)
    for step in range(250):
        rewards = torch.zeros(B, T)
        rewards[:, -1] = (torch.rand(B, generator=rng) < 0.5).float()
        values = atoms.detach()[:, 0].sort(-1).values.expand(B, T, M)
        targets = mixture_targets(rewards, values, mask, torch.zeros(B, M), 1.0, 0.8, torch.arange(B) + step * B)
        for _ in range(2):
            loss = critic_loss(
                *(atoms.expand(B, T, 1, M), targets, mask, config.critic_loss_spec()),
                delta=0.025,
                width=0.74,
                denominator=B * T,
            )
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
    return float(atoms.detach()[0, 0].sort().values[-2:].mean())


def test_eq_8_drives_the_upper_tail_of_bootstrapped_targets_and_eq_6_holds_it() -> None:
    alone = upper_tail_at_the_start("risk", "cvar", "gain", "shift", "shape", "curv", "consist")
    whole, without_gain = upper_tail_at_the_start(), upper_tail_at_the_start("gain")
    without_both = upper_tail_at_the_start("gain", "shape")
    assert abs(alone - 1) < 0.1, "quantile regression alone learns that no return is above 1"
    assert without_gain > whole + 0.3
    assert without_gain > without_both + 0.3


def test_the_robust_eq_8_does_not_chase_itself_with_or_without_eq_6() -> None:
    for removed in ((), ("gain",)):
        assert abs(upper_tail_at_the_start(*removed, form="robust") - 1) < 0.15, removed
