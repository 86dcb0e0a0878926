"""Reward functions that the check before a run refuses, and some that it must not; nothing slow is imported here."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any


def misspelt(response: str, answer: str) -> float:
    return float(reponse == answer)  # type: ignore[name-defined] # noqa: F821


def endless(response: str, answer: str) -> float:
    time.sleep(60)
    return 1.0


def nothing(response: str, answer: str) -> Any:
    return None


def crashes(response: str, answer: str) -> float:
    os._exit(9)


def uses_a_signal(response: str, answer: str) -> float:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)
    return 1.0


def wants_tags(response: str, answer: str) -> float:
    found = re.search("<answer>(.*)</answer>", response)
    return float(found.group(1) == answer)  # type: ignore[union-attr] # None.group raises: it costs the sample
