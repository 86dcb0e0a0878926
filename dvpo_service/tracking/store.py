"""Open an MLflow store when a run starts, or fail within a bounded time with one clear line."""

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
_TABLES_S = 120.0  # how long to wait while other runs create the tables of a new SQLite file
# By default, MLflow prints progress bars and links into the live table, and reports usage to its makers.
_QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The outbox tries again itself; MLflow's default (7 tries of 120 s) would only stall it.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
# While the run starts: 2 tries, 11.5 s in all with the pause between them.
_START_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def default_tracking_uri(run_dir: Path) -> str:
    """Return the URI of a SQLite file in the folder that holds the run folders, so that one UI shows all runs.

    Raises:
      TrackingError: the folder's path has a "?", with which the query of a database URI begins.
    """
    file = run_dir.absolute().parent / "mlflow.db"
    if "?" in str(file):
        raise TrackingError(
            f"{file}: MLflow cannot open a database below a folder with '?' in its name; give another --run-dir, "
            "or tracking.mlflow_uri"
        )
    return f"sqlite:///{file}"


def tracking_uri(config: Config, run_dir: Path) -> str:
    """Return the config's tracking URI, or by default that of a SQLite file beside the run folders.

    In a config that is read back from a run, the password is masked (``***``). The URI is then the environment's
    MLFLOW_TRACKING_URI.

    Raises:
      TrackingError: the password is masked, and MLFLOW_TRACKING_URI is not set.
    """
    uri = config.tracking.mlflow_uri
    if uri and MASK in uri and not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        raise TrackingError(
            f"tracking.mlflow_uri={config.tracking.mlflow_uri}: its password is masked, as in every file of a run; "
            "give the whole URI as tracking.mlflow_uri=... or in the environment as MLFLOW_TRACKING_URI"
        )
    return uri or default_tracking_uri(run_dir)


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite URI, or None for any other URI."""
    scheme, _, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]) if scheme.startswith("sqlite") else None


def artifact_root(uri: str) -> str | None:
    """Return the URI of the artifact folder beside a SQLite file, or None for a server, which has its own."""
    db = sqlite_path(uri)
    return None if db is None else (db.absolute().parent / "mlartifacts").as_uri()


def open_store(uri: str) -> MlflowClient:
    """Return a client after checking that the store answers. A new SQLite file gets its tables, in about 3 s.

    Raises:
      TrackingError: the store cannot be used.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import logging

    from mlflow import MlflowClient

    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with reaching(uri), _start_timeouts(), _one_at_a_time(uri):
        _probe(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Hold a lock beside the SQLite file: MLflow creates the tables of a new file without one.

    Of two runs that start together in a new folder, one would fail half way. Raises filelock.Timeout, an OSError.
    """
    db = sqlite_path(uri)
    if db is None:
        yield
        return
    db.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(db.with_name(f".{db.name}.lock"), timeout=_TABLES_S):
        yield


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn any failure of MLflow within the block into a TrackingError: what failed, where, and what to do."""
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
    """Return the OSError at the root of an error, such as ``Connection refused`` below four layers of HTTP library.

    When the root is another kind of error, return ``error`` itself.
    """
    deepest = error
    while below := deepest.__cause__ or deepest.__context__:
        deepest = below
    return deepest if isinstance(deepest, OSError) else error


def _probe(uri: str) -> None:
    """Connect to the database once: MLflow itself would try again and again for two minutes."""
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
def _start_timeouts() -> Iterator[None]:
    """Set short HTTP timeouts within the block, while a person waits for the run to start."""
    before = {name: os.environ.get(name) for name in _START_TIMEOUTS}
    os.environ.update(_START_TIMEOUTS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
