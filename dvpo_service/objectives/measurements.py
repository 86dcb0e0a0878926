"""What the loop measures of a batch and its advantages before the updates."""

from __future__ import annotations

from dvpo_service.algo.advantages import returns_to_go
from dvpo_service.algo.prompt_diagnostics import clean_correlation, explained_variance_by_prompt
from dvpo_service.types import Advantages, Metrics, Rollouts


def prompt_metrics(rollouts: Rollouts, estimate: Advantages, gamma: float) -> Metrics:
    """Return what critic and advantage know of the responses beyond their prompts; NaN where it cannot be told.

    - ``advantage/clean_correlation``: of the advantage with the clean outcome, within a prompt.
    - ``critic/explained_variance_between`` and ``critic/explained_variance_within`` prompts, where there is a critic.
    - ``critic/explained_variance_end``: within a prompt, of the last value of each response alone: the critic's
      judgement of a whole answer. Before the tokens that tell right from wrong no critic can explain anything within a
      prompt, so that ``within`` stays below it.
    """
    mask, prompts = rollouts.response_mask, rollouts.prompt_index
    metrics = {
        "advantage/clean_correlation": clean_correlation(estimate.advantages, rollouts.clean_scores, mask, prompts)
    }
    if estimate.values is None:
        return metrics
    returns = returns_to_go(rollouts.rewards, mask, gamma)
    between, within = explained_variance_by_prompt(estimate.values, returns, mask, prompts)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # no valid token follows
    _, end = explained_variance_by_prompt(estimate.values, returns, last, prompts)
    explained = {"between": between, "within": within, "end": end}
    return metrics | {f"critic/explained_variance_{name}": value for name, value in explained.items()}
