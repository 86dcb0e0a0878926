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


class EngineMismatch(UserError):
    """A rollout engine does not sample from the policy that is trained."""


class RewardsFailed(UserError):
    """No response of a step could be scored."""


def engine_mismatch(where: str, kl: float, bound: float) -> EngineMismatch:
    """Return the error of an engine whose log-probs are a KL of ``kl`` per token from the trainer's.

    Args:
      where: the step or the engine, at the start of the message.
    """
    return EngineMismatch(
        f"{where}: the rollout engine's log-probs are a KL of {kl:.3g} per token from the trainer's, more than "
        f"rollout.max_kl = {bound:g}: it holds other weights, or computes another model. Nothing was trained on its "
        "samples. Look at rollout.weight_transfer and model.dtype, and whether vLLM computes this architecture as "
        "transformers does; where the difference is known and small, raise rollout.max_kl"
    )


def one_line(text: object, limit: int | None = 300) -> str:
    """Return ``str(text)`` on one line, with single spaces, cut to ``limit`` characters (None: not cut)."""
    return " ".join(str(text).split())[:limit]


def describe_error(error: BaseException, limit: int | None = 300) -> str:
    """Return an exception's type and message on one line, the message cut to ``limit`` characters."""
    message = one_line(error, limit)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
