"""Every rollout engine by name: ``rollout.engine``. This module imports no vLLM: a config is checked without it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dvpo_service.errors import ConfigError
from dvpo_service.registry import plugins

KEY = "rollout.engine"

ENGINES: Mapping[str, str] = {"vllm": "actors.rollouts.engine:VllmEngine"}

# The methods that the engine pool and the weight sync call; roles.Engine documents each.
METHODS = (
    "start",
    "generate",
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
    """Return the class of the engine ``name``.

    Raises:
      ConfigError: it cannot be imported, is no class, or lacks a method of ``roles.Engine``.
    """
    engine = plugins.load(KEY, ENGINES.get(name, name))
    if not inspect.isclass(engine):
        raise ConfigError(f"{KEY} {name!r}: it must be a class with the methods of dvpo_service.roles.Engine")
    plugins.check_arguments(KEY, name, engine, ("config", "model_path", "backend"))
    if missing := [m for m in METHODS if not callable(getattr(engine, m, None))]:
        raise ConfigError(
            f"{KEY} {name!r}: it has no method {missing[0]}; derive it from dvpo_service.roles.Engine, which has "
            "defaults for most"
        )
    return engine
