"""``reward.judge``: a model behind an OpenAI-compatible endpoint that gives the score."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dvpo_service.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class JudgeConfig(Section):
    """A model that scores, asked once per response.

    Attributes:
      base_url: of the endpoint, up to ``/v1``.
      model: its name there.
      prompt: what it is asked, a Jinja template of ``response``, ``answer``, ``prompt`` and the row's columns.
      system: a system message, also a template.
      read: how its reply gives the score: ``number`` (the whole reply), ``regex`` (the last match's first group), or
        ``json`` (an object's ``score``; its other numbers are metrics).
      pattern: for ``regex``.
      range: the lowest and highest score; a reply outside fails, and the score is scaled to 0..1. Null takes any number
        as it is.
      max_tokens: of its reply; null leaves that to the endpoint.
      options: more fields of the request, as the endpoint knows them.
      key_env: the environment variable that holds the endpoint's key, on every node.
      concurrency: requests under way at once, over all workers.
      timeout_s: for one request; ``retries`` more are made after errors that may pass, with growing pauses.
      deadline_s: for all responses that are scored together.
      cache_size: replies that each worker keeps; the same question is asked once.
    """

    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/]")]
    model: Annotated[str, Field(min_length=1)]
    prompt: Annotated[str, Field(min_length=1)]
    system: str | None = None
    read: Literal["number", "regex", "json"] = "number"
    pattern: str | None = None
    range: tuple[float, float] | None = None
    temperature: NonNegativeFloat = 0.0
    max_tokens: Positive | None = 512
    options: dict[str, Any] = Field(default_factory=dict)
    key_env: str | None = None
    concurrency: Positive = 16
    timeout_s: PositiveFloat = 60.0
    retries: NonNegative = 4
    deadline_s: PositiveFloat = 300.0
    cache_size: NonNegative = 10_000

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("name the environment variable that holds the key, not the key itself")
        return name

    @field_validator("prompt", "system")
    @classmethod
    def _is_a_template(cls, text: str | None) -> str | None:
        import jinja2.sandbox

        try:
            jinja2.sandbox.ImmutableSandboxedEnvironment().parse(text or "")
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"not a Jinja template: {error.message} (line {error.lineno})") from error
        return text

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        if (self.read == "regex") != (self.pattern is not None):
            raise ValueError("pattern goes with read=regex, and read=regex needs one")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"pattern needs one group, around the score; it has {groups}")
        if self.range is not None and not -float("inf") < self.range[0] < self.range[1] < float("inf"):
            raise ValueError(f"range is the lowest and the highest score, got {list(self.range)}")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the score."""
        keys = {"model", "prompt", "system", "read", "pattern", "range", "temperature", "max_tokens", "options"}
        return self.model_dump(mode="json", include=keys)
