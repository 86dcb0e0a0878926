"""Try every ``module:name`` of a config on a tiny batch before anything starts.

Each plugin must load, take the arguments of its kind, and return tensors of the right shape.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from dvpo_service.config import Config
from dvpo_service.data.collate import collate
from dvpo_service.errors import ConfigError, UserError, describe_error
from dvpo_service.estimators.base import CriticObjective, Estimate, RunningStats, critic_objective
from dvpo_service.estimators.critic_terms import KEY as TERMS_KEY
from dvpo_service.estimators.critic_terms import load_terms
from dvpo_service.estimators.dvpo import DvpoObjective
from dvpo_service.registry import engines, estimators, policy_losses
from dvpo_service.registry.plugins import check_arguments, is_reference
from dvpo_service.roles import Engine
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
    if is_reference(config.rollout.engine):
        _check_engine(config.rollout.engine)


def _check_estimator(config: Config) -> None:
    name = config.algorithm.adv_estimator
    rollouts = _batch(config.rollout.n)
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
    if config.algorithm.critic_terms and not isinstance(objective, DvpoObjective):
        raise ConfigError(f"algorithm.critic_terms: only DvpoObjective and classes derived from it use them; {name!r}")
    stats = RunningStats(return_sd=0.5, return_width=0.4, worst_value=0.0)
    b, t = shape

    def run_estimate() -> tuple[Tensor, Any]:
        z = torch.randn(b, t, objective.heads, objective.quantiles, requires_grad=True)
        with torch.no_grad():
            return z, objective.estimate(z, z[:, -1], rollouts, seeds=torch.arange(b), pretraining=False, stats=stats)

    z, estimate = _call(estimators.KEY, name, run_estimate)
    if not isinstance(estimate, Estimate):
        raise ConfigError(
            f"{estimators.KEY} {name!r}: estimate() must return an Estimate, got {type(estimate).__name__}"
        )
    _expect(estimators.KEY, name, "estimate().advantages [b, T]", estimate.advantages, shape)
    _expect(estimators.KEY, name, "estimate().values [b, T]", estimate.values, shape)

    def run_loss() -> Any:
        loss, _ = objective.loss(
            z,
            estimate,
            rollouts.response_mask,
            denominator=rollouts.num_tokens,
            stats=stats,
            batch_mean_shift=0.1,
        )
        return loss

    loss = _call(estimators.KEY, name, run_loss)
    _expect(estimators.KEY, name, "the loss, a scalar", loss, ())
    _expect_gradient(estimators.KEY, name, loss, "the critic's predictions")


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
    _expect_gradient(key, name, surrogate, "logprobs")
    if not surrogate[mask.bool()].isfinite().all():
        raise ConfigError(f"{key} {name!r}: the loss of a token is not finite on a small batch")


def _check_engine(name: str) -> None:
    engine = engines.load(name)
    for method in ("start", "generate", "update_weights"):
        if getattr(engine, method) is getattr(Engine, method):
            raise ConfigError(f"{engines.KEY} {name!r}: it does not define {method}, for which Engine has no default")
    if not hasattr(engine, "transfers"):
        raise ConfigError(f"{engines.KEY} {name!r}: it has no `transfers`; derive it from dvpo_service.roles.Engine")


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


def _expect_gradient(key: str, name: str, loss: Tensor, of: str) -> None:
    if not loss.requires_grad:
        raise ConfigError(f"{key} {name!r}: no gradient flows from the loss to {of}, so nothing would be learned")


def _batch(n: int = 2) -> Rollouts:
    """Return two prompts with ``n`` responses each, at least two, of different lengths."""
    n = max(2, n)
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "1", "check", (5, 6, 7)) for i in range(2)]
    groups = [
        [Sample(i, j, (8,) * k, (-1.0,) * k, "1", "stop", 0) for j, k in enumerate(islice(cycle(lengths), n))]
        for i, lengths in enumerate(_LENGTHS)
    ]
    scores = [[Score(float(j), float(j)) for j in range(n)] for _ in range(2)]
    rollouts = collate(prompts, groups, scores)
    return rollouts.with_(logprobs=rollouts.rollout_logprobs)
