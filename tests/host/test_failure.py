"""Turning exceptions into one line."""

from __future__ import annotations

import errno

from dvpo_service.errors import DataError
from dvpo_service.host.failure import describe


def test_an_error_to_mend_keeps_its_words() -> None:
    assert describe(DataError("rows.jsonl:3: no answer")) == ("rows.jsonl:3: no answer", 2)


def test_a_full_disk_says_so() -> None:
    text, code = describe(OSError(errno.ENOSPC, "No space left on device", "/runs/x"))
    assert "the disk is full (/runs/x)" in text
    assert code == 2


def test_anything_else_is_one_line_with_a_hint() -> None:
    text, code = describe(ValueError("a\n  b"))
    assert text.startswith("ValueError: a b; run again with `dvpo --debug")
    assert code == 1
