"""Decide which rules give an alert at a step."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from dvpo_service.alerts.history import History, Missing
from dvpo_service.alerts.rules import RULES, Rule

REPEAT_AFTER = 50  # steps until a metric that is still bad gives another alert


@dataclass
class _State:
    bad_for: int = 0  # measurements in a row
    alerted_at: int | None = None  # the step of the last alert


class Advisor:
    """Checks every step's metrics against ``RULES``.

    A rule gives an alert when its condition has been bad at ``patience`` measurements in a row. It gives another alert
    when the condition was good in between and is bad again, or when it is still bad 50 steps later. A step that lacks
    the rule's metric (absent or not finite) does not count and does not interrupt the row, so evaluations every 25
    steps can make up a row. A run that resumes can give the metrics of its earlier steps to ``check`` and ignore the
    alerts.

    Args:
      patience: measurements in a row, at least 1; some rules have their own.
      silent: names of rules that do not apply to this run.
      max_grad_norm: ``policy.optim.max_grad_norm`` as "policy" and ``critic.optim.max_grad_norm`` as "critic"; each is
        1, the default of the config, where it is absent.

    Raises:
      ValueError: patience is below 1.
    """

    def __init__(
        self, patience: int = 3, *, silent: Container[str] = (), max_grad_norm: Mapping[str, float] | None = None
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience counts measurements in a row and is at least 1, got {patience}")
        self._patience = patience
        self._history = History({"policy": 1.0, "critic": 1.0, **(max_grad_norm or {})})
        self._states = {rule.name: _State() for rule in RULES}
        self._rules = [rule for rule in RULES if rule.name not in silent]

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return the alerts of this step, one line each. ``step`` must increase from call to call."""
        self._history.add(metrics)
        lines = [self._judge(rule, step) for rule in self._rules if step >= rule.after]
        return [line for line in lines if line]

    def _judge(self, rule: Rule, step: int) -> str | None:
        state = self._states[rule.name]
        try:
            numbers = rule.condition.find(self._history)
        except Missing:
            return None
        if numbers is None:
            self._states[rule.name] = _State()
            return None
        state.bad_for += 1
        alerted_lately = state.alerted_at is not None and step - state.alerted_at < REPEAT_AFTER
        if state.bad_for < (rule.patience or self._patience) or alerted_lately:
            return None
        state.alerted_at = step
        return f"step {step} [{rule.name}] {rule.seen.format(**numbers)} {rule.helps}"
