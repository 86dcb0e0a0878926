"""Reaching an MLflow store when a run starts: within a bounded time, or one clear line."""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from dvpo_service.errors import TrackingError, one_line
from dvpo_service.host.secrets import MASK, mask_message, mask_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from dvpo_service.config import Config

_DB_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_CONNECT_S = 5.0
_TABLES_S = 120.0  # until those before have made them
# MLflow prints progress bars and links into the live table, and reports usage to its makers.
_QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The outbox outlives outages; MLflow's own patience (7 tries of 120 s) would only stall it.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
# At the start: 2 tries, 11.5 s in all with the pause between them.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def default_tracking_uri(run_dir: Path) -> str:
    """SQLite in the folder that holds the run folders, so that all its runs stand in one UI."""
    return f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"


def tracking_uri(config: Config, run_dir: Path) -> str:
    """The config's, or else SQLite beside the run folders. A config read back from a run has no password any more
    (``***``): then it is that of the environment, MLFLOW_TRACKING_URI. Raises TrackingError where that is missing."""
    uri = config.tracking.mlflow_uri
    if uri and MASK in uri and not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        raise TrackingError(
            f"tracking.mlflow_uri={config.tracking.mlflow_uri}: its password is masked, as in every file of a run; "
            "give the whole URI as tracking.mlflow_uri=... or in the environment as MLFLOW_TRACKING_URI"
        )
    return uri or default_tracking_uri(run_dir)


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, None for any other."""
    scheme, _, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]) if scheme.startswith("sqlite") else None


def artifact_root(uri: str) -> str | None:
    """Beside a SQLite file; a server decides for itself (None)."""
    db = sqlite_path(uri)
    return None if db is None else (db.absolute().parent / "mlartifacts").as_uri()


def open_store(uri: str) -> MlflowClient:
    """A client whose store is known to answer; a new SQLite file gets its tables (about 3 s)."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import logging

    from mlflow import MlflowClient

    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with reaching(uri), _impatient(), _one_at_a_time(uri):
        _probe(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """MLflow makes a new SQLite file's tables without a lock: of two runs that start together in a new folder, one
    would fail half way. Raises filelock.Timeout, an OSError."""
    db = sqlite_path(uri)
    if db is None:
        yield
        return
    db.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(db.with_name(f".{db.name}.lock"), timeout=_TABLES_S):
        yield


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Any failure inside, said as a TrackingError: what, where, what to do."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, sqlite3.Error, ImportError) as failed:
        error = _cause(failed)
        detail = one_line(mask_message(str(error), uri), None)
        short = detail if len(detail) < 240 else detail[:240] + "..."
        raise TrackingError(
            f"MLflow store {mask_uri(uri)} cannot be used: {type(error).__name__}: {short}; start it or mend "
            "tracking.mlflow_uri, or train without it: tracking.mlflow=false"
        ) from failed


def _cause(error: BaseException) -> BaseException:
    """``Connection refused`` under four layers of HTTP library, where that is what happened."""
    deepest = error
    while below := deepest.__cause__ or deepest.__context__:
        deepest = below
    return deepest if isinstance(deepest, OSError) else error


def _probe(uri: str) -> None:
    """Fail in seconds where MLflow would try a database again and again for two minutes."""
    db = sqlite_path(uri)
    if db is not None:
        with closing(sqlite3.connect(db, timeout=_CONNECT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # takes the write lock: the file is writable
            connection.rollback()
        return
    parts = urlsplit(uri)
    port = _DB_PORTS.get(parts.scheme.partition("+")[0])
    if port is not None and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), timeout=_CONNECT_S).close()


@contextmanager
def _impatient() -> Iterator[None]:
    """Short HTTP time-outs while a person waits for the run to start."""
    before = {name: os.environ.get(name) for name in _IMPATIENT}
    os.environ.update(_IMPATIENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
