"""What is wrong with one row, before it is known whether to stop or to skip it."""

from __future__ import annotations


class BadRow(Exception):
    """``reason`` is short and the same for like rows, so that it can be counted; ``what`` is for a person."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what


def show(value: object, limit: int = 40) -> str:
    """The value on one line of at most ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
