"""Check requests before anything is computed. Errors have the form of OpenAI's API."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dvpo_service.config.base import Fraction, Section
from dvpo_service.config.serve import ServeConfig
from dvpo_service.serving.values import DEFAULT_LEVELS

RANKS = ("mean", "cvar", "upper_tail")


class BadRequest(Exception):
    """A request that is not answered with 200.

    Args:
      message: what is wrong, in words.
      status: the HTTP status.
      param: the request's field that is wrong, if it is one field.
      kind: the error's type, as OpenAI's API names it.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, kind: str = "BadRequestError"):
        super().__init__(message)
        self.status, self.param, self.kind = status, param, kind

    def body(self) -> dict[str, Any]:
        """Return the response's JSON: ``{"error": {...}}``."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}


class ValuesRequest(Section):
    """The body of ``POST /v1/values``: a prompt as text or chat messages, and the response to value.

    Attributes:
      levels: quantile levels in [0, 1], or "all" for every atom.
      alpha, beta: fractions of the lower and the upper tail; by default those that the critic was trained with.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    response: str
    levels: tuple[Annotated[float, Field(ge=0, le=1)], ...] | Literal["all"] = DEFAULT_LEVELS
    alpha: Fraction | None = None
    beta: Fraction | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> ValuesRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt (text) and messages (a chat)")
        return self


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises BadRequest when there is none."""
    try:
        tree = json.loads(body)
    except ValueError as error:  # also text that is not UTF-8
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise BadRequest(f"the body must be a JSON object, this is {type(tree).__name__}")
    return tree


def parse_values(body: bytes) -> ValuesRequest:
    """Return the checked body of ``POST /v1/values``. Raises BadRequest for the first field that is wrong."""
    try:
        return ValuesRequest.model_validate(parse(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{where}: {first['msg']}".removeprefix(": "), param=where or None) from error


def check_generation(request: dict[str, Any], limits: ServeConfig) -> None:
    """Raise BadRequest for a completion or chat request that exceeds the limits.

    A request without a length gets the limit as its ``max_tokens``, in place.
    """
    prompt = request.get("prompt")
    n = request.get("n", 1)
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    n = 1 if n is None else n
    if not isinstance(n, int) or n < 1:
        raise BadRequest(f"n must be a positive integer, got {n!r}", param="n")
    if prompts * n > limits.max_n:
        raise BadRequest(f"{prompts} prompts x n = {n} samples is more than {limits.max_n} a request", param="n")
    for name in ("max_tokens", "max_completion_tokens"):
        asked, most = request.get(name), limits.max_new_tokens
        if most is not None and isinstance(asked, int) and asked > most:
            raise BadRequest(f"{name} = {asked} is more than {most}", param=name)
    if limits.max_new_tokens is not None and request.get("max_tokens", request.get("max_completion_tokens")) is None:
        request["max_tokens"] = limits.max_new_tokens


def pop_rank(request: dict[str, Any]) -> str | None:
    """Remove ``rank_by`` from a request, since the engine does not know it, and return it.

    Raises:
      BadRequest: the value is unknown, or the request streams.
    """
    rank_by = request.pop("rank_by", None)
    if rank_by is None:
        return None
    if rank_by not in RANKS:
        raise BadRequest(f"rank_by is one of {', '.join(RANKS)}, got {rank_by!r}", param="rank_by")
    if request.get("stream"):
        raise BadRequest("rank_by needs whole responses and cannot stream; leave one of the two out", param="stream")
    return rank_by
