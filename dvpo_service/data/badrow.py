"""The error for one bad row, raised before it is decided whether to stop or to skip the row."""

from __future__ import annotations


class BadRow(Exception):
    """A row cannot be used. ``reason`` is a short category to count rows by; ``what`` is the message."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what


def show(value: object, limit: int = 40) -> str:
    """Return the value's repr, on one line and cut to at most ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
