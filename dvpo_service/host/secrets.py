"""Secrets out of what is shown: MLflow, logs and messages get the masked text only."""

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
_SHORTEST = 8  # characters of an environment's secret: masking shorter ones would maim every text
# user:password@ of a URI; the greedy last part takes a password that itself holds an @.
_URI_LOGIN = re.compile(r"(?<=://)[^/\s]*@")
_URI_QUERY = re.compile(r"([?&][^=&\s]*(?:token|password|secret|key|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def mask(tree: Any, key: str = "") -> Any:
    """A copy of a config tree in which no secret stands.

    A string under a key that names a secret is masked whole; ``max_new_tokens: 16`` is a number
    and stays. Credentials inside URIs are masked under any key.
    """
    if isinstance(tree, dict):
        return {k: mask(v, f"{key}.{k}") for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [mask(v, key) for v in tree]
    if not isinstance(tree, str):
        return tree
    return MASK if tree and _SECRET_KEY.search(key) else mask_uri(tree)


def names_secret(key: str) -> bool:
    return bool(_SECRET_KEY.search(key))


def mask_override(override: str) -> str:
    """``tracking.tags.hf_token=***`` for a ``key.sub=value``."""
    key, equals, value = override.partition("=")
    return key + equals + str(mask(value, key))


def mask_text(text: str) -> str:
    """Any text for a person, a log or a file: no credentials of URIs, no secret of this process's environment."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and names_secret(name):
            text = text.replace(value, MASK)
    return mask_uri(text)


class MaskingFormatter(logging.Formatter):
    """A log record without secrets, its stack trace too."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


def mask_uri(text: str) -> str:
    """The text with ``user:password@`` and secret query parameters of its URIs replaced."""
    return _URI_QUERY.sub(rf"\1{MASK}", _URI_LOGIN.sub(f"{MASK}@", text))


def mask_message(text: str, uri: str) -> str:
    """A library's error text about ``uri``, without its password, however the library wrote it."""
    try:
        password = urlsplit(uri).password
    except ValueError:  # not a URI that has one
        password = None
    for secret in {password, unquote(password)} if password else ():
        text = text.replace(secret, MASK)
    return mask_uri(text)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys to text; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)
    return flat
