"""Find the scoring function that a reward's name stands for, and call it."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from numbers import Real
from typing import Any

from dvpo_service.errors import ConfigError, describe_error
from dvpo_service.host.secrets import mask_text
from dvpo_service.registry import plugins
from dvpo_service.rewards import exact_match
from dvpo_service.rewards.calling import PLAIN, Convention, Work, convention_of

BUILT_IN = ("exact_match", "gsm8k", "math_verify", "share_right", "code")
OF_TEXT = ("exact_match", "gsm8k", "math_verify", "share_right")  # compare with an answer that is text


@dataclass(frozen=True)
class Result:
    """What a reward made of one response.

    Attributes:
      value: the score; NaN where it failed.
      metrics: what it measured besides.
      error: why it failed, else None.
      vote: the response's answer, for a majority vote.
    """

    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    vote: str | None = None


class NotANumber(ValueError):
    """A scoring function returned something that is no finite number."""


def finite_number(value: object) -> float:
    """Return what a scoring function returned as a float: a number of Python, or a numpy or torch one of no axes.

    Raises:
      NotANumber: it is something else, infinite or NaN.
    """
    number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if isinstance(number, Real) and math.isfinite(number):
        return float(number)
    raise NotANumber(f"the scoring function returned {number!r:.80}, not a finite number")


def read(returned: object) -> Result:
    """Return the result that a function returned: a number, or a mapping with ``score`` and metrics by name.

    A metric that is no finite number is left out.

    Raises:
      NotANumber: the score is no finite number, or there is none.
    """
    if not isinstance(returned, Mapping):
        return Result(finite_number(returned))
    if "score" not in returned:
        raise NotANumber(f"the scoring function returned a dict without 'score', it has {list(returned)!r:.80}")
    metrics: dict[str, float] = {}
    for name, value in returned.items():
        with contextlib.suppress(NotANumber):
            metrics[str(name)] = finite_number(value)
    return Result(finite_number(returned["score"]), {k: v for k, v in metrics.items() if k != "score"})


@dataclass(frozen=True)
class Scorer:
    """A scoring function that can be called.

    Attributes:
      score: any function that ``calling.convention_of`` takes.
      convention: how it is called.
      extract: ``extract(response)`` returns the response's answer, or None, for a majority vote.
    """

    name: str
    score: Callable[..., Any]
    convention: Convention = PLAIN
    extract: Callable[[str], str | None] = exact_match.extract

    def __call__(self, response: str, answer: Any, /) -> Any:
        """Return the score of one response, without a row."""
        [result] = self.results(Work([response], answer, [0]))
        if result.error:
            raise ValueError(result.error)
        return result.value

    def results(self, work: Work, *, timeout_s: float | None = None, votes: bool = False) -> list[Result]:
        """Return a result per response; whatever the function raises becomes the ``error`` of its own response.

        Args:
          timeout_s: of each call of an async function. The calls for one prompt run side by side.
          votes: also extract each response's answer.
        """
        if self.convention.batch:
            found = self._batch(work, timeout_s)
        elif inspect.iscoroutinefunction(self.score) or inspect.iscoroutinefunction(type(self.score).__call__):
            found = run(self._together(work, timeout_s))
        else:
            found = [self._one(work, response) for response in work.responses]
        return [self._vote(r, response) for r, response in zip(found, work.responses, strict=True)] if votes else found

    def attempt(self, work: Work) -> None:
        """Score once, and let whatever is raised through."""
        if self.convention.batch:
            for value in self._returned(work, None):
                read(value)
            return
        returned = self.call(work.one(work.responses[0]))
        read(run(_awaited(returned)) if inspect.isawaitable(returned) else returned)

    def call(self, values: Mapping[str, Any]) -> Any:
        """Return what the function returns for ``values`` (``Work.one`` or ``Work.batch``)."""
        positional, keywords = self.convention.arguments(values)
        return self.score(*positional, **keywords)

    def _one(self, work: Work, response: str) -> Result:
        try:
            returned = self.call(work.one(response))
            return read(run(_awaited(returned)) if inspect.isawaitable(returned) else returned)
        except Exception as error:  # noqa: BLE001 - user code may raise anything, and it is recorded
            return failed(error)

    async def _together(self, work: Work, timeout_s: float | None) -> list[Result]:
        async def one(response: str) -> Result:
            deadline = asyncio.timeout(timeout_s)
            try:
                async with deadline:
                    return read(await self.call(work.one(response)))
            except Exception as error:  # noqa: BLE001 - as in _one
                late = deadline.expired() and isinstance(error, TimeoutError)
                return Result(math.nan, error=f"no answer within {timeout_s:g} s") if late else failed(error)

        return list(await asyncio.gather(*map(one, work.responses)))

    def _batch(self, work: Work, timeout_s: float | None) -> list[Result]:
        try:
            return [_read_one(value) for value in self._returned(work, timeout_s)]
        except Exception as error:  # noqa: BLE001 - as in _one
            return [failed(error)] * len(work.responses)

    def _returned(self, work: Work, timeout_s: float | None) -> list[Any]:
        """Return the list that a function of a batch returns."""
        returned = self.call(work.batch())
        if inspect.isawaitable(returned):
            returned = run(_awaited(returned, timeout_s))
        if isinstance(returned, str) or not (isinstance(returned, Sequence) or getattr(returned, "ndim", 0) == 1):
            raise NotANumber(f"the scoring function of a batch returned {returned!r:.80}, not a list of scores")
        if len(returned) != len(work.responses):
            raise NotANumber(
                f"the scoring function returned {len(returned)} scores for {len(work.responses)} responses"
            )
        return list(returned)

    def _vote(self, result: Result, response: str) -> Result:
        if result.error:
            return result
        try:
            return Result(result.value, result.metrics, vote=self.extract(response))
        except Exception as error:  # noqa: BLE001 - as in _one
            return failed(error)


def _read_one(value: object) -> Result:
    try:
        return read(value)
    except NotANumber as error:
        return failed(error)


def failed(error: Exception) -> Result:
    """Return the result of a response that could not be scored; what it says has no secrets in it."""
    text = str(error) if isinstance(error, NotANumber) else describe_error(error, None)
    return Result(math.nan, error=mask_text(text))


async def _awaited(returned: Any, timeout_s: float | None = None) -> Any:
    async with asyncio.timeout(timeout_s):
        return await returned


@cache
def _runner() -> asyncio.Runner:
    """The event loop of this process's async rewards: one for all calls, so that their clients can be kept."""
    return asyncio.Runner()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what the coroutine returns."""
    return _runner().run(coroutine)


def resolve(name: str) -> Scorer:
    """Return the scorer that ``name`` stands for.

    Args:
      name: a built-in, or any ``module:function`` whose arguments ``calling.convention_of`` takes. The function may
        have an attribute ``extract``.

    Raises:
      ConfigError: there is no such built-in, or the function cannot be loaded or takes other arguments.
    """
    if name in BUILT_IN:
        module = importlib.import_module(f"dvpo_service.rewards.{name}")
        return Scorer(name, module.score, extract=module.extract)
    if not plugins.is_reference(name):
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"reward {name!r}: {hint}use one of {', '.join(BUILT_IN)}, or module:function")
    function = plugins.load("reward", name)
    return Scorer(name, function, convention_of(name, function), getattr(function, "extract", exact_match.extract))
