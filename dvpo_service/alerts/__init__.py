"""Warnings in words when a measurement is bad for a while: what is seen, and what usually helps.

Pure: metrics in, sentences out. ``rules.RULES`` is the whole knowledge; docs/troubleshooting.md shows it as a table.
"""

from dvpo_service.alerts.advisor import Advisor
from dvpo_service.alerts.rules import RULES, Rule

__all__ = ["RULES", "Advisor", "Rule"]
