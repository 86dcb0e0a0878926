"""Claims about the Huber advantage under noise, measured on one prompt whose answer is right with probability 0.7.

The critic is taken to be right: its atoms are the quantiles of the noisy reward's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from dvpo_service.algo.huber_advantage import huber_advantages

P, GROUPS, N, M = 0.7, 6_000, 8, 100

NOISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # from two uniform draws
    "none": lambda u, v: torch.zeros_like(u),
    "normal": lambda u, v: torch.special.ndtri(u),
    "student t, 2 df": lambda u, v: (2 * u - 1) / (2 * u * (1 - u)).sqrt(),
    "5 % spikes": lambda u, v: 20 * torch.special.ndtri(u) * (v < 0.05),
    "30 % spikes": lambda u, v: 20 * torch.special.ndtri(u) * (v < 0.3),
    "10 % spikes down": lambda u, v: -20 * torch.special.ndtri(u).abs() * (v < 0.1),
    "cauchy 0.3": lambda u, v: 0.3 * torch.tan(torch.pi * (u - 0.5)),
}
# Relative to PPO without noise, of 160,000 samples: PPO, GRPO, RLOO, Huber with c = 1, and a tiny c.
TABLE = {
    "none": (1.000, 0.746, 0.835, 0.995, 0.995),
    "normal": (0.140, 0.117, 0.120, 0.145, 0.145),
    "student t, 2 df": (0.014, 0.043, 0.012, 0.070, 0.072),
    "5 % spikes": (0.008, 0.315, 0.007, 0.686, 0.684),
    "30 % spikes": (0.001, 0.009, 0.001, 0.142, 0.141),
    "10 % spikes down": (0.004, 0.151, 0.004, 0.675, 0.670),
    "cauchy 0.3": (0.000, 0.104, 0.000, 0.215, 0.231),
}


def draws(noise: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return n outcomes of 0 and 1, and their noisy rewards."""
    generator = torch.Generator().manual_seed(seed)
    u, v, w = torch.rand(3, n, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    right = (w < P).double()
    return right, right + NOISE[noise](u, v)


@cache
def distribution(noise: str) -> tuple[Tensor, Tensor]:
    """Return the atoms [M] of the noisy reward's distribution, and its mean."""
    _, rewards = draws(noise, 400_000, seed=1)
    levels = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    return rewards.sort().values[(levels * len(rewards)).long()], rewards.mean()


def huber(noise: str, rewards: Tensor, clip: float) -> Tensor:
    atoms, n = distribution(noise)[0], rewards.numel()
    mask = torch.ones(1, n, dtype=torch.bool)
    return huber_advantages(atoms.expand(1, n, M), rewards.view(1, n, 1), mask, clip).view_as(rewards)


@cache
def signal_to_noise(noise: str) -> dict[str, float]:
    """Return squared mean over variance of a sample's policy gradient, by estimator, relative to PPO without noise."""
    right, rewards = (x.view(GROUPS, N) for x in draws(noise, GROUPS * N, seed=0))
    group = rewards.mean(1, keepdim=True)
    advantages = {
        "ppo": rewards - distribution(noise)[1],
        "grpo": (rewards - group) / (rewards.std(1, correction=0, keepdim=True) + 1e-6),
        "rloo": (rewards - group) * N / (N - 1),
        "huber": huber(noise, rewards, 1.0),
        "rank": huber(noise, rewards, 1e-3),
    }
    gradients = {name: a * (right - P) for name, a in advantages.items()}  # by the logit of a right answer
    free = P * (1 - P) / (P**3 + (1 - P) ** 3 - P * (1 - P))  # of (right - P)^2, exactly
    return {name: float(g.mean() ** 2 / g.var()) / free for name, g in gradients.items()}


@pytest.mark.parametrize("noise", TABLE)
def test_the_signal_to_noise_of_the_policy_gradient(noise: str) -> None:
    measured = signal_to_noise(noise)
    for (name, value), expected in zip(measured.items(), TABLE[noise], strict=True):
        assert value == pytest.approx(expected, rel=0.1, abs=0.01), name


@pytest.mark.parametrize("noise", TABLE)
def test_it_is_never_much_worse_than_ppo_and_never_below_grpo(noise: str) -> None:
    measured = signal_to_noise(noise)
    assert measured["huber"] > 0.98 * measured["ppo"]
    assert measured["huber"] > 1.15 * measured["grpo"]
    if "spikes" in noise:
        assert measured["huber"] > 2 * measured["grpo"]
        assert measured["huber"] > 50 * measured["ppo"]


@pytest.mark.parametrize("clip", [1e-3, 1.0])
@pytest.mark.parametrize("noise", TABLE)
def test_its_mean_is_zero_whatever_the_distribution(noise: str, clip: float) -> None:
    _, rewards = draws(noise, 40_000, seed=2)
    advantages = huber(noise, rewards, clip)
    assert float(advantages.mean()) == pytest.approx(0, abs=4 * float(advantages.std()) / 200 + 0.02 * clip)
    assert float(advantages.std()) > 0.3 * clip


def test_a_clipped_advantage_has_another_mean_where_the_distribution_is_skewed() -> None:
    noise = "10 % spikes down"
    _, rewards = draws(noise, 40_000, seed=2)
    assert float((rewards - distribution(noise)[1]).clamp(-1, 1).mean()) == pytest.approx(0.78, abs=0.03)
    assert abs(float(huber(noise, rewards, 1.0).mean())) < 0.02
