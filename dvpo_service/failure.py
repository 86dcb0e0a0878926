"""Any exception as one line for a person, and an exit code: 2 when they can mend it, 1 otherwise."""

from __future__ import annotations

import errno

from dvpo_service.errors import UserError

HINT = "run again with `dvpo --debug ...` for the stack trace"


def describe(error: BaseException) -> tuple[str, int]:
    """The line and the exit code."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full ({error.filename or 'no space left'}); free some and give the command again",
            2,
        )
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}; {HINT}", 1
