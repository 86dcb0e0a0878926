"""One replica of the critic: it values responses, many requests per forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve
from transformers import PreTrainedTokenizerBase

from dvpo_service.config import Config
from dvpo_service.data.encode import text_ids
from dvpo_service.errors import one_line
from dvpo_service.models.load import load_tokenizer
from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.requests import ValuesRequest
from dvpo_service.serving.returned import Returned, returned_ids
from dvpo_service.serving.values import ResponseValues, ValueModel, ValueQuery, as_json


class ValueServer:
    """A deployment that values responses; requests that arrive together share a forward pass."""

    def __init__(self, config: Config):
        self.config = config
        self.version = ""
        self.model: ValueModel | None = None
        self.tokenizer: PreTrainedTokenizerBase
        self._batched.set_max_batch_size(config.serve.value_batch)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(config.serve.value_wait_s)  # type: ignore[attr-defined]

    async def reconfigure(self, current: dict[str, str]) -> None:
        """Load the critic in ``current["critic"]`` and the tokenizer of the policy in ``current["policy"]``.

        Until both are loaded, the critic before answers. Ray Serve calls this.
        """
        trust = self.config.model.trust_remote_code
        tokenizer, model = await asyncio.gather(
            asyncio.to_thread(load_tokenizer, current["policy"], trust_remote_code=trust),
            asyncio.to_thread(ValueModel, Path(current["critic"]), trust_remote_code=trust),
        )
        self.tokenizer, self.model, self.version = tokenizer, model, current["version"]

    async def ready(self) -> str:
        """Return the version of the weights."""
        return self.version

    async def along(self, asked: ValuesRequest) -> dict[str, Any]:
        """Value every state of a response.

        Returns:
          ``{"body": ..., "version": ...}``: the JSON body of ``/v1/values``, and the version of the critic.

        Raises:
          BadRequest: the prompt is empty, does not fit the chat template, or prompt and response are too long.
        """
        prompt, response = encode(self.tokenizer, asked)
        levels = None if asked.levels == "all" else asked.levels
        [(values, version)] = await self._score([ValueQuery(prompt, response, levels, asked.alpha, asked.beta)])
        tokens = [str(self.tokenizer.decode([i])) for i in response]
        body = {"object": "values", "model": self.config.serve.model_name or self.config.name}
        return {"body": body | as_json(values, tokens, response), "version": version}

    async def score(self, responses: Sequence[Returned]) -> list[ResponseValues]:
        """Return the values after the text of each response, in order. Raises BadRequest when one is too long."""
        queries = [
            ValueQuery(r.prompt_ids, returned_ids(self.tokenizer, r), levels=(), only_last=True) for r in responses
        ]
        return [values for values, _ in await self._score(queries)]

    async def _score(self, queries: Sequence[ValueQuery]) -> list[tuple[ResponseValues, str]]:
        """Return the values of each query with the version of the weights that computed them."""
        assert self.model is not None
        for query in queries:
            length = len(query.prompt_ids) + len(query.response_ids)
            if not query.prompt_ids:
                raise BadRequest("the prompt is empty: a value needs at least one token before the response")
            if self.model.max_tokens is not None and length > self.model.max_tokens:
                raise BadRequest(f"prompt and response are {length} tokens; the critic reads {self.model.max_tokens}")
        return list(await asyncio.gather(*(self._batched(q) for q in queries)))

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def _batched(self, queries: list[ValueQuery]) -> list[tuple[ResponseValues, str]]:
        assert self.model is not None
        version = self.version  # read first: newer weights may be loaded during the forward pass
        return [(values, version) for values in await asyncio.to_thread(self.model.values, queries)]


def encode(tokenizer: PreTrainedTokenizerBase, asked: ValuesRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of the prompt and of the response. Chat messages go through the chat template, as in training.

    Raises:
      BadRequest: the messages do not fit the chat template.
    """
    prompt: Any
    if asked.messages is None:
        assert asked.prompt is not None, "a request has messages or a prompt"
        prompt = text_ids(asked.prompt, tokenizer)
    else:
        messages = [message.model_dump(exclude_unset=True) for message in asked.messages]
        try:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program of the model's, which may raise anything
            why = one_line(error) or type(error).__name__
            raise BadRequest(f"the chat template refuses the messages: {why}", param="messages") from error
    response = tokenizer(asked.response, add_special_tokens=False)["input_ids"]
    return tuple(prompt), tuple(response)
