"""Errors that a person can fix: one line that says what, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """The command line prints the message, without a stack trace, and exits with ``exit_code``."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A data file or row that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or model folder that does not fit or cannot be loaded."""


class ClusterError(UserError):
    """The plan does not fit the machines, or they cannot be reached."""


class TrackingError(UserError):
    """The tracking store cannot be reached when the run starts."""


def one_line(text: object, limit: int | None = 300) -> str:
    """Return ``str(text)`` with every run of white space as one space, cut to ``limit`` characters (None: not cut)."""
    return " ".join(str(text).split())[:limit]


def describe_error(error: BaseException, limit: int | None = 300) -> str:
    """Return an exception's type and message on one line, the message cut to ``limit`` characters."""
    message = one_line(error, limit)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
