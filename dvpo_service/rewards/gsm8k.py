"""Score 1 where the response's final number equals the answer's, as GSM8K is graded."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus right after a digit or letter is a subtraction, not a sign. A comma counts only
# between groups of three digits, a point only before a digit: "1,234.50." is 1234.50.
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)])-)?(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)")


def score(response: str, answer: str) -> float:
    """Return 1.0 if the final numbers are equal, else 0.0. Raises ``ValueError`` when the answer has no number."""
    target = _final_number(answer)
    if target is None:
        raise ValueError(f"the answer {answer!r} has no number; the gsm8k reward needs one")
    return float(_final_number(response) == target)


def extract(response: str) -> str | None:
    """Return the final number in plain notation (``1,200.50`` is ``1200.5``), or None if there is none."""
    number = _final_number(response)
    if number is None:
        return None
    text = f"{number or abs(number):f}"  # no "-0"; normalize() would round to 28 digits
    return text.rstrip("0").rstrip(".") if "." in text else text


def _final_number(text: str) -> Decimal | None:
    """Return the first number after the last ``####``, or without ``####`` the last number; None if there is none."""
    _, marker, tail = text.replace("$", "").replace("\N{MINUS SIGN}", "-").rpartition("####")
    numbers = _NUMBER.findall(tail)
    if not numbers:
        return None
    return Decimal(numbers[0 if marker else -1].replace(",", ""))
