"""Ask a model behind an OpenAI-compatible endpoint for the score of each response."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2.meta
import jinja2.sandbox

from dvpo_service.config.judge import JudgeConfig
from dvpo_service.errors import ConfigError, describe_error, one_line
from dvpo_service.host.secrets import keep_secret, mask_text, mask_uri
from dvpo_service.rewards.calling import ONE, Work
from dvpo_service.rewards.scoring import NotANumber, Result, failed, finite_number, read, run

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_SHOWN = 200  # characters of a reply in an error

Messages = list[dict[str, str]]


def template_columns(config: JudgeConfig) -> tuple[str, ...]:
    """Return the columns that the templates name."""
    names: set[str] = set()
    for text in (config.prompt, config.system or ""):
        names |= jinja2.meta.find_undeclared_variables(_environment().parse(text))
    return tuple(sorted(names - set(ONE)))


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    return jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class JudgePart:
    """A judge that scores groups of responses, ``concurrency`` requests at once.

    An endpoint that is down, too slow, or answers something else costs the responses that it was asked about: they
    fail, and none gets a score of 0.

    Args:
      workers: over which ``concurrency`` is divided.
      deadline_s: for all responses of one call.

    Raises:
      ConfigError: the environment has no key under the name that the config gives.
    """

    def __init__(self, config: JudgeConfig, *, workers: int = 1, deadline_s: float | None = None):
        self.config = config
        self.deadline_s = deadline_s or config.deadline_s
        self.at_once = math.ceil(config.concurrency / workers)
        self.cache: OrderedDict[str, Result] = OrderedDict()
        self.prompt = _environment().from_string(config.prompt)
        self.system = _environment().from_string(config.system) if config.system else None
        self.key = "none"  # the library sends one always
        if config.key_env is not None:
            keep_secret(config.key_env)
            self.key = os.environ.get(config.key_env, "")
            if not self.key:
                raise ConfigError(
                    f"reward.judge.key_env={config.key_env}: there is no such environment variable here; set it on "
                    "every node before Ray starts there"
                )

    @cached_property
    def client(self) -> AsyncOpenAI:
        """The library's client, which retries with growing pauses."""
        from openai import AsyncOpenAI

        c = self.config
        return AsyncOpenAI(api_key=self.key, base_url=c.base_url, timeout=c.timeout_s, max_retries=c.retries)

    def score(self, groups: Sequence[Work]) -> list[list[Result]]:
        """Return the results of every group."""
        return run(self._score(groups))

    def attempt(self, work: Work) -> None:
        """Ask once. Raises ConfigError when the endpoint does not answer, NotANumber when its reply is no score."""
        self._read(run(self._first_reply(work)))

    async def _first_reply(self, work: Work) -> str:
        from openai import OpenAIError

        try:
            return await self._ask(self.messages(work, work.responses[0]))
        except OpenAIError as error:
            raise ConfigError(
                f"the judge at {mask_uri(self.config.base_url)} gives no answer: {_reason(error)}; start it, or mend "
                "reward.judge"
            ) from error

    def messages(self, work: Work, response: str) -> Messages:
        """Return the question about one response. Raises jinja2.UndefinedError if the row lacks a column."""
        values = work.one(response)
        system = [{"role": "system", "content": self.system.render(values)}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt.render(values)}]

    async def _score(self, groups: Sequence[Work]) -> list[list[Result]]:
        slots, until = asyncio.Semaphore(self.at_once), asyncio.get_running_loop().time() + self.deadline_s
        asked: dict[str, asyncio.Task[Result]] = {}

        def ask(work: Work, response: str) -> asyncio.Task[Result] | Result:
            try:
                messages = self.messages(work, response)
            except Exception as error:  # noqa: BLE001 - a template may raise anything, and it costs its response
                return failed(error)
            key = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
            if key not in asked:
                asked[key] = asyncio.ensure_future(self._result(key, messages, slots, until))
            return asked[key]

        pending = [[ask(work, response) for response in work.responses] for work in groups]
        await asyncio.gather(*asked.values())
        return [[p.result() if isinstance(p, asyncio.Task) else p for p in group] for group in pending]

    async def _result(self, key: str, messages: Messages, slots: asyncio.Semaphore, until: float) -> Result:
        if key in self.cache:
            self.cache.move_to_end(key)
            return self.cache[key]
        try:
            async with asyncio.timeout_at(until), slots:
                result = self._read(await self._ask(messages))
        except TimeoutError:
            return Result(math.nan, error=f"no answer from the judge within {self.deadline_s:g} s for all responses")
        except NotANumber as error:
            return failed(error)
        except Exception as error:  # noqa: BLE001 - the library has many errors, and each costs its response only
            return Result(math.nan, error=f"the judge gave no answer: {_reason(error)}")
        self.cache[key] = result
        while len(self.cache) > self.config.cache_size:
            self.cache.popitem(last=False)
        return result

    async def _ask(self, messages: Messages) -> str:
        c = self.config
        limit = {} if c.max_tokens is None else {"max_tokens": c.max_tokens}
        reply: Any = await self.client.chat.completions.create(  # type: ignore[call-overload]
            model=c.model, messages=messages, temperature=c.temperature, extra_body=c.options, **limit
        )
        choices = getattr(reply, "choices", None)  # an endpoint of another kind answers with something else
        if not choices:
            raise NotANumber(f"the judge's reply has no choices: {one_line(reply, _SHOWN)}")
        return choices[0].message.content or ""

    def _read(self, reply: str) -> Result:
        """Return the score in a reply. Raises NotANumber."""
        shown = repr(one_line(reply, _SHOWN))
        if self.config.read == "json":
            result = _from_json(reply, shown)
        else:
            result = Result(_number(self.config.pattern, reply, shown))
        if self.config.range is None:
            return result
        low, high = self.config.range
        if not low <= result.value <= high:
            raise NotANumber(f"the judge answered {shown}, whose score is not from {low:g} to {high:g}")
        return Result((result.value - low) / (high - low), result.metrics)


def _from_json(reply: str, shown: str) -> Result:
    start, end = reply.find("{"), reply.rfind("}")
    try:
        found = json.loads(reply[start : end + 1]) if start >= 0 else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "score" not in found:
        raise NotANumber(f"the judge answered {shown}, not a JSON object with a score")
    score = found["score"]
    return read(found | {"score": _number(None, score, shown) if isinstance(score, str) else score})


def _number(pattern: str | None, reply: str, shown: str) -> float:
    text = reply.strip()
    if pattern is not None:
        matches = list(re.finditer(pattern, reply))
        if not matches or matches[-1][1] is None:
            raise NotANumber(f"the judge answered {shown}, which reward.judge.pattern does not match")
        text = matches[-1][1].strip()
    try:
        return finite_number(float(text))
    except ValueError as error:
        raise NotANumber(f"the judge answered {shown}, not a number") from error


def _reason(error: Exception) -> str:
    """Return an error's text without secrets, with the cause that the library leaves out (connection refused)."""
    cause = error.__cause__
    why = f" ({describe_error(cause, _SHOWN)})" if cause else ""
    return mask_text(describe_error(error) + why)
