"""Every policy loss by name: ``policy.loss``. This module imports no torch: a config is checked without it.

A built-in is a function in objectives/policy_losses.py and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from dvpo_service.registry import plugins

KEY = "policy.loss"

POLICY_LOSSES: Mapping[str, str] = {
    "ppo": "dvpo_service.objectives.policy_losses:ppo",
    "gspo": "dvpo_service.objectives.policy_losses:gspo",
    "cispo": "dvpo_service.objectives.policy_losses:cispo",
}


def check_name(name: str) -> str:
    """Return ``name`` where it is a built-in loss or ``module:name``; raise ValueError otherwise."""
    return plugins.check_name(KEY, name, POLICY_LOSSES)


@cache
def load(name: str) -> Any:
    """Return the loss function (``objectives.policy_losses.PolicyLoss``). Raises ConfigError if it cannot be loaded."""
    return plugins.load(KEY, POLICY_LOSSES.get(name, name))
