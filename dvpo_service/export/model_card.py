"""The model card, ``README.md`` of an export: what the model is, how it was trained, and how accurate it is.

The card never contains a path of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from dvpo_service.config import Config

TEMPLATE = "model_card.md.j2"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def model_card(
    config: Config,
    step: int,
    rows: Sequence[Mapping[str, Any]],
    *,
    critic: bool,
    changed: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """Return the card as Markdown with the Hub's front matter.

    Args:
      config: with its secrets masked.
      step: the number of updates done.
      rows: the lines of ``metrics.jsonl``, up to ``step``.
      critic: whether the export has a critic.
      changed: the settings that changed during training, by the step from which they held.
    """
    algorithm = config.algorithm
    scalar = "the value, the mean of the return"
    distribution = f"{algorithm.n_heads} heads x {algorithm.n_quantiles} quantiles of the return"
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    template = environment.from_string((resources.files("dvpo_service.export") / TEMPLATE).read_text())
    return template.render(
        config=config,
        step=step,
        critic=critic,
        front_matter=yaml.safe_dump(_front_matter(config), sort_keys=False).strip(),
        base_model=hub_name(config),
        algorithm_words=_algorithm(config),
        critic_words=distribution if algorithm.traits.distributional else scalar,
        splits=_splits(rows),
        settings=_settings(config),
        changed={at: [_without_folders(what) for what in changes] for at, changes in (changed or {}).items()},
    )


def hub_name(config: Config) -> str | None:
    """Return the base model's name on the Hub, or None when it is a local folder or was made by the warm start."""
    path = config.model.path
    return path if path and _HUB_NAME.fullmatch(path) and not Path(path).exists() else None


def _front_matter(config: Config) -> dict[str, Any]:
    base = hub_name(config)
    tags = ["reinforcement-learning", "dvpo-service", config.algorithm.adv_estimator]
    return {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags} | (
        {"base_model": base} if base else {}
    )


def _splits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per held-out split: its accuracies at the first and at the newest evaluation."""
    measured = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if not measured:
        return []
    first, last = measured[0], measured[-1]
    names = dict.fromkeys(key.split("/")[1] for key in last if key.startswith("eval/"))
    return [
        {"name": name, "step": last["step"]}
        | {
            f"{words}_{when}": _figure(row.get(f"eval/{name}/{key}"), graded=f"eval/{name}/graded" in last)
            for words, key in (("sampled", "accuracy"), ("greedy", "greedy"))
            for when, row in (("before", first), ("after", last))
        }
        for name in names
    ]


def _without_folders(change: str) -> str:
    """Return a change of a setting, ``-`` where it would show a path."""
    return change if "/" not in change else f"{change.partition(':')[0]}: other files"


def _figure(value: float | None, *, graded: bool) -> str:
    """Return a share of right answers as a percentage, and a mean of graded rewards as it is."""
    return "-" if value is None else f"{value:.3f}" if graded else f"{value:.1%}"


def _algorithm(config: Config) -> str:
    a = config.algorithm
    return f"{a.adv_estimator}, {a.form} form" if a.traits.distributional else a.adv_estimator


def _settings(config: Config) -> dict[str, str]:
    a, r = config.algorithm, config.rollout
    settings = {
        "advantages": _algorithm(config),
        "policy loss": config.policy.loss,
        "updates": f"{r.prompts_per_step} prompts x {r.n} responses each, up to {r.max_new_tokens} tokens",
        "learning rate": f"policy {config.policy.optim.lr:g}"
        + (f", critic {config.critic.optim.lr:g}" if a.has_critic else ""),
        "gamma, lambda": f"{a.gamma:g}, {a.lam:g}",
        "KL to the base model": f"{config.policy.kl.coef:g}",
        "reward": f"`{config.reward.words}`, noise: {config.reward.noise_words}",
        "training data": ", ".join(Path(f.removeprefix("shipped:")).name for f in config.data.train_files),
        "seed": str(config.trainer.seed),
    }
    if a.traits.distributional:
        weights = {name: weight for name, weight in a.dvpo_loss_weights.effective().items() if weight}
        weights |= a.critic_terms
        settings |= {
            "critic": f"{a.n_heads} heads x {a.n_quantiles} quantiles at {a.quantile_levels} levels",
            "tails": f"lower {a.dvpo_alpha:g}, upper {a.dvpo_beta:g}; risk eta {a.risk_eta:g}",
            "critic loss terms": ", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
            "risk in the advantage": a.advantage,
        }
    return settings
