"""Masking of secrets, so that MLflow, logs and messages never show them."""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any
from urllib.parse import unquote, urlsplit

MASK = "***"
_SECRET_KEY = re.compile(
    r"token|passw(or)?d|passphrase|secret|(api|access|private)[_-]?key|credential|authorization|bearer", re.IGNORECASE
)
# Shorter values of secret environment variables are not masked: they would match parts of ordinary words.
_SHORTEST = 8
_KEPT: set[str] = set()  # environment variables that the config says are secret
# user:password@ of a URI. The greedy match covers a password that contains an @.
_URI_LOGIN = re.compile(r"(?<=://)[^/\s]*@")
_URI_QUERY = re.compile(r"([?&][^=&\s]*(?:token|password|secret|key|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def mask(tree: Any, key: str = "") -> Any:
    """Return a copy of a config tree without secrets.

    A string under a key that names a secret is masked whole. Numbers stay, so ``max_new_tokens: 16`` is kept.
    Credentials inside URIs are masked under any key.

    Args:
      key: the dotted key of ``tree``.
    """
    if isinstance(tree, dict):
        return {k: mask(v, f"{key}.{k}") for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [mask(v, key) for v in tree]
    if not isinstance(tree, str):
        return tree
    return MASK if tree and _SECRET_KEY.search(key) else mask_uri(tree)


def names_secret(key: str) -> bool:
    """Return whether a config key or environment variable of this name holds a secret."""
    return bool(_SECRET_KEY.search(key))


def mask_override(override: str) -> str:
    """Return a ``key.sub=value`` with secrets masked, as in ``tracking.tags.hf_token=***``."""
    key, equals, value = override.partition("=")
    return key + equals + str(mask(value, key))


def keep_secret(variable: str) -> None:
    """Treat the value of this environment variable as a secret, whatever the variable is called."""
    _KEPT.add(variable)


def mask_text(text: str) -> str:
    """Return any text with URI credentials, and the secrets in this process's environment, masked."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and (names_secret(name) or name in _KEPT):
            text = text.replace(value, MASK)
    return mask_uri(text)


class MaskingFormatter(logging.Formatter):
    """Formats log records with secrets masked, also in stack traces."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


def mask_uri(text: str) -> str:
    """Return the text with ``user:password@`` and secret query parameters of its URIs masked."""
    return _URI_QUERY.sub(rf"\1{MASK}", _URI_LOGIN.sub(f"{MASK}@", text))


def mask_message(text: str, uri: str) -> str:
    """Return a library's error text with the password of ``uri`` masked, whether it is percent-encoded or not."""
    try:
        password = urlsplit(uri).password
    except ValueError:  # not a URI, so it has no password
        password = None
    for secret in {password, unquote(password)} if password else ():
        text = text.replace(secret, MASK)
    return mask_uri(text)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of a tree as text by dotted key; lists are JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)
    return flat
