"""Try every ``module:name`` of a config on a tiny batch before anything starts.

Each plugin must load, take the arguments of its kind, and return tensors of the right shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dvpo_service.config import Config
from dvpo_service.data.collate import collate
from dvpo_service.errors import ConfigError, UserError, describe_error
from dvpo_service.estimators.base import CriticObjective, RunningStats, critic_objective
from dvpo_service.estimators.critic_terms import KEY as TERMS_KEY
from dvpo_service.estimators.critic_terms import load_terms
from dvpo_service.registry import engines, estimators, policy_losses
from dvpo_service.registry.plugins import check_arguments, is_reference
from dvpo_service.types import Prompt, Rollouts, Sample, Score

_LENGTHS = ((3, 5), (2, 4))  # response tokens by prompt and sample


def check_plugins(config: Config) -> None:
    """Raise ConfigError for the first plugin of the config that cannot be used, saying what was expected of it."""
    if is_reference(config.algorithm.adv_estimator):
        _check_estimator(config)
    if is_reference(config.policy.loss):
        _check_policy_loss(config)
    if config.algorithm.critic_terms:
        _check_critic_terms(config)
    engines.load(config.rollout.engine)


def _check_estimator(config: Config) -> None:
    name = config.algorithm.adv_estimator
    rollouts = _batch()
    shape = tuple(rollouts.response_mask.shape)
    estimator = estimators.load(name)
    if not config.algorithm.has_critic:
        check_arguments(estimators.KEY, name, estimator, ("rollouts", "algorithm"))
        advantages = _call(estimators.KEY, name, estimator, rollouts, config.algorithm)
        _expect(estimators.KEY, name, "advantages [B, T]", advantages, shape)
        return
    if not (isinstance(estimator, type) and issubclass(estimator, CriticObjective)):
        raise ConfigError(
            f"{estimators.KEY} {name!r}: an estimator that needs a critic is a class derived from "
            "dvpo_service.estimators.base.CriticObjective, or from a built-in such as DvpoObjective"
        )
    check_arguments(estimators.KEY, name, estimator, ("algorithm", "critic"))
    objective = _call(estimators.KEY, name, critic_objective, config.algorithm, config.critic)
    stats = RunningStats(return_sd=0.5, worst_value=0.0)
    b, t = shape
    z = torch.randn(b, t, objective.heads, objective.quantiles, requires_grad=True)

    def run_estimate() -> Any:
        with torch.no_grad():
            return objective.estimate(z, z[:, -1], rollouts, seeds=torch.arange(b), pretraining=False, stats=stats)

    estimate = _call(estimators.KEY, name, run_estimate)
    _expect(estimators.KEY, name, "estimate().advantages [b, T]", estimate.advantages, shape)
    _expect(estimators.KEY, name, "estimate().values [b, T]", estimate.values, shape)

    def run_loss() -> Any:
        return objective.loss(
            z,
            estimate,
            rollouts.response_mask,
            denominator=rollouts.num_tokens,
            stats=stats,
            batch_mean_shift=0.1,
        )[0]

    _expect(estimators.KEY, name, "the loss, a scalar", _call(estimators.KEY, name, run_loss), ())


def _check_policy_loss(config: Config) -> None:
    key, name = policy_losses.KEY, config.policy.loss
    rollouts = _batch()
    loss = policy_losses.load(name)
    check_arguments(key, name, loss, ("logprobs", "old_logprobs", "advantages", "mask", "policy"))
    mask, shape = rollouts.response_mask, tuple(rollouts.response_mask.shape)
    old = rollouts.rollout_logprobs
    logprobs = (old + 0.1).requires_grad_()
    result = _call(key, name, loss, logprobs, old, torch.ones(shape), mask, config.policy)
    surrogate, clipped = result if isinstance(result, tuple) and len(result) == 2 else (result, mask)
    _expect(key, name, "the loss of each token [b, T]", surrogate, shape)
    _expect(key, name, "where it was clipped [b, T]", clipped, shape)
    if not surrogate.requires_grad:
        raise ConfigError(f"{key} {name!r}: no gradient flows from the loss to logprobs, so nothing would be learned")


def _check_critic_terms(config: Config) -> None:
    a = config.algorithm
    heads = torch.randn(2, 5, a.n_heads, a.n_quantiles).sort(-1).values.requires_grad_()
    targets = torch.randn(2, 5, a.n_quantiles).sort(-1).values
    levels = torch.linspace(0, 1, a.n_quantiles)
    for reference, term in zip(a.critic_terms, load_terms(a.critic_terms).values(), strict=True):
        values = _call(TERMS_KEY, reference, term.function, heads, targets, levels)
        _expect(TERMS_KEY, reference, "a number for each token [B, T]", values, (2, 5))


def _call(key: str, name: str, function: Any, *arguments: Any) -> Any:
    """Return ``function(*arguments)``. Turn any error of the user's code into a ConfigError."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{key} {name!r}: it fails on a small batch: {describe_error(error)}") from error


def _expect(key: str, name: str, what: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless ``value`` is a tensor of ``shape``. ``what`` names it in the message."""
    if not isinstance(value, Tensor):
        raise ConfigError(f"{key} {name!r}: expected {what} as a tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ConfigError(f"{key} {name!r}: expected {what}, here {list(shape)}; got {list(value.shape)}")


def _batch() -> Rollouts:
    """Return two prompts with two responses each, all of different lengths."""
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "1", "check", (5, 6, 7)) for i in range(2)]
    groups = [
        [Sample(i, j, (8,) * n, (-1.0,) * n, "1", "stop", 0) for j, n in enumerate(lengths)]
        for i, lengths in enumerate(_LENGTHS)
    ]
    scores = [[Score(float(j), float(j)) for j in range(2)] for _ in range(2)]
    rollouts = collate(prompts, groups, scores)
    return rollouts.with_(logprobs=rollouts.rollout_logprobs)
