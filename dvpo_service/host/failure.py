"""Turn any exception into one line and an exit code: 2 when the user can fix the cause, 1 otherwise."""

from __future__ import annotations

import errno

from dvpo_service.errors import UserError, describe_error
from dvpo_service.host.secrets import mask_text

HINT = "run again with `dvpo --debug ...` for the stack trace"


def describe(error: BaseException) -> tuple[str, int]:
    """Return the line, with secrets masked, and the exit code."""
    line, code = _line(error)
    return mask_text(line), code


def _line(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full ({error.filename or 'no space left'}); free some and give the command again",
            2,
        )
    return f"{describe_error(error, 600)}; {HINT}", 1
