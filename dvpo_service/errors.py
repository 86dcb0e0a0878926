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
