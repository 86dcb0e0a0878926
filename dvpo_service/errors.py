"""Errors that a user can fix. Each message is one line that says what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix. The command line prints only the message, and exits with ``exit_code``."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A data file or row that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or model folder that does not fit or cannot be loaded."""


class ClusterError(UserError):
    """The planned resources do not fit the machines, or the machines cannot be reached."""


class TrackingError(UserError):
    """The tracking store cannot be used, or a file of logged steps is damaged."""


class RewardsFailed(UserError):
    """No response of a step could be scored."""


def one_line(text: object, limit: int | None = 300) -> str:
    """Return ``str(text)`` on one line, with single spaces, cut to ``limit`` characters (None: not cut)."""
    return " ".join(str(text).split())[:limit]


def describe_error(error: BaseException, limit: int | None = 300) -> str:
    """Return an exception's type and message on one line, the message cut to ``limit`` characters."""
    message = one_line(error, limit)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
