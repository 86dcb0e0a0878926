"""What clients may send: the fields that the gateway checks, their types and their limits.

The models below check requests, and the OpenAPI schema is made of them, so that what ``/docs`` says is what holds. An
integer is what JSON Schema calls one: 60, 60.0 or 6e1, but neither "60" nor true.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_validator,
)

from dvpo_service.config.base import Section
from dvpo_service.config.serve import ServeConfig
from dvpo_service.serving.body import parse
from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.values import DEFAULT_LEVELS, RankBy

Kind = Literal["chat", "completion"]
MAX_LEVELS = 256


def _number(value: Any) -> Any:
    """Raise ValueError for text and booleans, which pydantic would take for integers."""
    if isinstance(value, (str, bool)):
        raise ValueError("Input should be a valid integer")
    return value


def _unsupported(value: Any) -> Any:
    """Raise ValueError unless ``value`` is None or 1. vLLM would ignore the field without a word."""
    if value not in (None, 1):
        raise ValueError("only 1 is supported; give n and rank_by")
    return value


def _is_prompt(value: Any) -> Any:
    """Raise ValueError unless ``value`` is a text, texts, token ids, or lists of token ids."""
    if not (isinstance(value, str) or _texts(value) or _ids(value) or (_full(value) and all(map(_ids, value)))):
        raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists, none of it empty")
    return value


def _full(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def _texts(value: Any) -> bool:
    return _full(value) and all(isinstance(v, str) for v in value)


def _ids(value: Any) -> bool:
    return _full(value) and all(type(v) is int and 0 <= v < 2**63 for v in value)


_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}}
_TEXTS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "string"}}
_MANY_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": _IDS_SCHEMA}
_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _TEXTS_SCHEMA, _IDS_SCHEMA, _MANY_IDS_SCHEMA]}

Integer = Annotated[int, BeforeValidator(_number)]
Seed = Annotated[int, Field(gt=-(2**63), lt=2**63), BeforeValidator(_number)]
Text = Annotated[str, Field(strict=True)]
Prompt = Annotated[Any, AfterValidator(_is_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
Share = Annotated[StrictFloat, Field(gt=0, le=1)]
Level = Annotated[StrictFloat, Field(ge=0, le=1)]


class Message(BaseModel):
    """A message of a chat, as OpenAI's API has it; further fields go to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: Text
    content: Text | list[dict[str, Any]] | None = None


class GenerationRequest(BaseModel):
    """What completions and chats have in common. Fields that are not here go to vLLM, which checks them.

    ``request_type`` adds the server's limits.

    Attributes:
      rank_by: return the best of ``n`` responses by this measure of the critic's distribution.
    """

    model_config = ConfigDict(extra="allow")
    model: Text | None = None
    max_tokens: Integer | None = None
    n: Integer | None = None
    seed: Seed | None = None
    stop: Text | list[Text] | None = None
    stream: StrictBool | None = None
    temperature: Annotated[StrictFloat, Field(ge=0)] | None = None
    top_p: Share | None = None
    echo: StrictBool | None = None
    use_beam_search: StrictBool | None = None
    return_token_ids: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    rank_by: RankBy | None = None
    best_of: Annotated[Literal[1] | None, BeforeValidator(_unsupported)] = None

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return 1

    @model_validator(mode="after")
    def _ranked_responses_are_whole_and_alone(self) -> Self:
        if self.rank_by:
            for name in ("stream", "echo", "use_beam_search"):
                if getattr(self, name):
                    raise ValueError(f"rank_by needs whole sampled responses, without {name}; leave one of the two out")
        return self


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``, as OpenAI's API has it, and ``rank_by``."""

    prompt: Prompt
    logprobs: Integer | None = None

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return len(self.prompt) if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else 1


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``, as OpenAI's API has it, and ``rank_by``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Integer | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Integer | None = None


class TextMessage(Message):
    """A message whose content is text."""

    content: Text


class ValuesRequest(Section):
    """The body of ``POST /v1/values``: a prompt as text or chat messages, and the response to value.

    Attributes:
      levels: quantile levels in [0, 1], or "all" for every atom.
      alpha, beta: fractions of the lower and the upper tail; by default those that the critic was trained with.
    """

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[TextMessage], Field(min_length=1)] | None = None
    response: Text
    levels: Annotated[tuple[Level, ...], Field(max_length=MAX_LEVELS)] | Literal["all"] = DEFAULT_LEVELS
    alpha: Share | None = None
    beta: Share | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt (text) and messages (a chat)")
        return self


def request_type(kind: Kind, limits: ServeConfig) -> type[GenerationRequest]:
    """Return the model of a completion's or chat's body, with the limits of this server."""
    base = CompletionRequest if kind == "completion" else ChatRequest
    tokens = Annotated[int, Field(ge=0, le=limits.max_new_tokens), BeforeValidator(_number)] | None
    samples = Annotated[int, Field(ge=1, le=limits.max_n), BeforeValidator(_number)] | None
    fields: dict[str, Any] = {
        "max_tokens": (tokens, None),
        "n": (samples, None),
    }
    if kind == "chat":
        fields["max_completion_tokens"] = (tokens, None)
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, **fields)


def checked(model: type[BaseModel], tree: dict[str, Any]) -> Any:
    """Return ``tree`` as a ``model``. Raises BadRequest for the first field that is wrong."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Without the names of types in pydantic's paths: levels.tuple[float, ...].0
        path = [part for part in map(str, first["loc"]) if part.isidentifier() or part.isdigit()]
        why = first["msg"].removeprefix("Value error, ")
        raise BadRequest(": ".join(filter(None, [".".join(path), why])), param=path[0] if path else None) from error


def check_generation(body: bytes, model: type[GenerationRequest], limits: ServeConfig) -> GenerationRequest:
    """Return a completion or chat request. One without a length gets the limit as its ``max_tokens``.

    Raises:
      BadRequest: a field is wrong or beyond the limits.
    """
    request: GenerationRequest = checked(model, parse(body))
    samples = request.prompts * (request.n or 1)
    if samples > limits.max_n:
        raise BadRequest(
            f"{request.prompts} prompts x n = {request.n or 1} samples is more than {limits.max_n} a request", param="n"
        )
    length = getattr(request, "max_completion_tokens", None)
    if request.max_tokens is None and length is None and limits.max_new_tokens is not None:
        request.max_tokens = limits.max_new_tokens
    return request


def check_model(asked: str | None, served: str) -> None:
    """Raise BadRequest (404) when a request names another model than the one that is served."""
    if asked is not None and asked != served:
        raise BadRequest(f"the model {asked!r} does not exist; this server has {served!r}", status=404, param="model")
