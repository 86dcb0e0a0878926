"""Every rollout engine by name: ``rollout.engine``. No vLLM here: a config is read without it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dvpo_service.errors import ConfigError
from dvpo_service.registry import plugins

KEY = "rollout.engine"

ENGINES: Mapping[str, str] = {"vllm": "actors.rollouts.engine:VllmEngine"}

# What the pool and the weight sync call; roles.Engine says what each does.
METHODS = (
    "start",
    "generate",
    "score",
    "heartbeat",
    "init_weight_transfer_engine",
    "shutdown_weight_transfer_engine",
    "start_weight_update",
    "sees",
    "update_weights",
    "finish_weight_update",
    "set_version",
    "stop",
)


def check_name(name: str) -> str:
    """Return ``name`` where it is a built-in engine or ``module:name``; raise ValueError otherwise."""
    return plugins.check_name(KEY, name, ENGINES)


def load(name: str) -> Any:
    """Return an engine's class.

    Raises:
      ConfigError: it is not there, is no class, or lacks a method of ``roles.Engine``.
    """
    found = plugins.load(KEY, ENGINES.get(name, name))
    if not inspect.isclass(found):
        raise ConfigError(f"{KEY} {name!r}: it must be a class with the methods of dvpo_service.roles.Engine")
    plugins.check_arguments(KEY, name, found, ("config", "model_path", "backend"))
    if missing := [m for m in METHODS if not callable(getattr(found, m, None))]:
        raise ConfigError(
            f"{KEY} {name!r}: it has no method {missing[0]}; derive it from dvpo_service.roles.Engine, which has "
            "defaults for most"
        )
    return found
