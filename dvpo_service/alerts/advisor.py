"""Which rules speak at a step."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from dvpo_service.alerts.history import History, Missing
from dvpo_service.alerts.rules import RULES, Rule

REPEAT_AFTER = 50  # steps until a rule that still holds speaks again


@dataclass
class _State:
    bad_for: int = 0
    said_at: int | None = None


class Advisor:
    """Checks every step's metrics against ``RULES``.

    A rule speaks when it has been bad at ``patience`` measurements in a row, once; again when it was good in
    between, or is still bad 50 steps later. A step without its metric (absent or not finite) neither counts nor
    breaks the row, so evaluations every 25 steps make a row too. A run that resumes can give its old rows to
    ``check`` and drop the answers.

    Args:
      patience: measurements in a row, at least 1; some rules have their own.
      silent: names of rules that mean nothing for this run.
      max_grad_norm: ``policy.optim.max_grad_norm`` and ``critic.optim.max_grad_norm`` as "policy" and "critic"; 1,
        their default, where absent.

    Raises:
      ValueError: for a patience below 1.
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
        """One line for each rule that speaks at this step. Steps rise from call to call."""
        self._history.add(metrics)
        lines = [self._judge(rule, step) for rule in self._rules if step >= rule.after]
        return [line for line in lines if line]

    def _judge(self, rule: Rule, step: int) -> str | None:
        state = self._states[rule.name]
        try:
            found = rule.condition.find(self._history)
        except Missing:
            return None
        if found is None:
            state.bad_for, state.said_at = 0, None
            return None
        state.bad_for += 1
        said_lately = state.said_at is not None and step - state.said_at < REPEAT_AFTER
        if state.bad_for < (rule.patience or self._patience) or said_lately:
            return None
        state.said_at = step
        return f"step {step} [{rule.name}] {rule.seen.format(**found)} {rule.helps}"
