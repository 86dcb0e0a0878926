"""Names and values that every MLflow store takes, whatever a user calls a split, a file or a tag.

MLflow refuses other characters than letters, digits, ``_-./: `` in the names of metrics, parameters and tags, paths
that are not normal (``a//b``, ``/a``, ``../a``), and what is longer than its databases' columns.
"""

from __future__ import annotations

import hashlib
import re

from dvpo_service.errors import TrackingError

NAME_LIMIT, RUN_NAME_LIMIT, EXPERIMENT_LIMIT = 250, 250, 500
PARAM_LIMIT, TAG_LIMIT = 6000, 8000  # characters of a value
_UNSAFE = re.compile(r"[^\w\-. :]")


def safe_name(name: str) -> str:
    """Return the name of a metric, parameter, tag or artifact; a name that MLflow takes is returned as it is.

    Each part between slashes that has to change gets a hash of what it was, so that different names stay different:
    ``eval/aime@24/accuracy`` becomes ``eval/aime_24-34feab/accuracy``, always the same.
    """
    return _fit("/".join(map(_safe_part, name.split("/"))), NAME_LIMIT)


def safe_run_name(name: str) -> str:
    """Return a name for a run, of any characters that a text may have."""
    return _fit(safe_text(name, None), RUN_NAME_LIMIT)


def safe_experiment(name: str) -> str:
    """Return a name for an experiment; ``dvpo`` for an empty one."""
    return _fit(safe_text(name, None), EXPERIMENT_LIMIT) or "dvpo"


def safe_text(text: str, limit: int | None) -> str:
    """Return the value of a parameter or tag, cut to ``limit`` characters; databases take no NUL or half characters."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


def check_model_name(name: str) -> None:
    """Raise TrackingError unless MLflow's registry takes ``name`` for a model."""
    if not name.strip() or re.search("[/:\0]", name) or name in (".", "..") or len(name) > 256:
        raise TrackingError(f"{name!r:.80} cannot name a registered model: it needs a name without / and :")


def _safe_part(part: str) -> str:
    safe = _UNSAFE.sub("_", part)
    if safe.strip(".") == "":  # empty, or leads elsewhere as a path
        safe = "_" * max(1, len(part))
    return safe if safe == part else f"{safe}-{_hash(part)}"


def _fit(name: str, limit: int) -> str:
    """Return the name, cut where it is too long and then unique by a hash."""
    return name if len(name) <= limit else f"{name[: limit - 7]}-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
