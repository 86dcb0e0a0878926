"""Alerts: when a metric has been bad for a while, say in words what is seen and what usually helps.

Metrics go in, sentences come out; there are no side effects. All rules are in ``rules.RULES``, and
docs/troubleshooting.md shows them as a table.
"""

from dvpo_service.alerts.advisor import Advisor
from dvpo_service.alerts.rules import RULES, Rule

__all__ = ["RULES", "Advisor", "Rule"]
