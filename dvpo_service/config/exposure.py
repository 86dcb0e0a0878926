"""Warnings about choices in a config that let others run code, read secrets or use a server."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from dvpo_service.config import Config
from dvpo_service.host.secrets import mask_uri

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MLFLOW_LOGINS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def warnings_of(config: Config) -> list[str]:
    """Return one line for each risky setting; the defaults give none."""
    lines = []
    if config.model.trust_remote_code:
        model = config.model.path or "the model's folder"
        lines.append(f"model.trust_remote_code=true: Python code that comes with {model} runs here, with your rights")
    for part in config.reward.parts:
        if part.model and part.model.trust_remote_code:
            lines.append(
                f"reward.model.trust_remote_code=true: Python code that comes with {part.model.path} runs here, with "
                "your rights"
            )
    uri = config.tracking.mlflow_uri or ""
    if config.tracking.mlflow and _sends_login_in_the_clear(uri):
        lines.append(f"tracking.mlflow_uri={mask_uri(uri)}: its password travels readable over plain http; use https")
    return lines


def serving_warning(host: str, *, with_key: bool) -> str | None:
    """Return a warning for a server that listens beyond loopback, or None for a loopback address."""
    if host in LOOPBACK:
        return None
    if not with_key:
        return f"anyone who reaches {host} can use this server; set DVPO_API_KEY"
    return f"serve.host={host}: the API key travels readable over plain http; put a proxy with TLS before it"


def dashboard_warning(url: str | None) -> str | None:
    """Return a warning for a Ray dashboard beyond loopback on a cluster without tokens, or None.

    Args:
      url: ``host:port`` of the dashboard; None or empty when there is none.
    """
    host = (url or "").rpartition(":")[0].strip("[]")
    if not host or host in LOOPBACK or os.environ.get("RAY_AUTH_MODE") == "token":
        return None
    return (
        f"Ray's dashboard listens on {url} and asks for no token: whoever reaches it can run code on the cluster; "
        "give `ray start` --dashboard-host=127.0.0.1, or RAY_AUTH_MODE=token (docs/security.md)"
    )


def _sends_login_in_the_clear(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
    except ValueError:  # not a URI; MLflow itself reports that
        return False
    login = parts.password or any(os.environ.get(name) for name in _MLFLOW_LOGINS)
    return parts.scheme == "http" and bool(login) and parts.hostname not in LOOPBACK
