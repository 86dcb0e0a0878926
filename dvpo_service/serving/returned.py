"""The tokens of the text that is returned: fewer than were sampled where a stop string cut the response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

CONTEXT = 16  # tokens of the prompt that are decoded too: some tokenizers write a first token in another way


@dataclass(frozen=True)
class Returned:
    """A response as vLLM returns it.

    Attributes:
      prompt_ids: the prompt's tokens.
      sampled_ids: every token that was sampled.
      text: what the client gets.
      stop: what ended the response: a text or a token that the request or the model's generation config names,
        None for the end-of-sequence token.
      ended: whether anything ended it, rather than the length limit.
      skip_special_tokens: whether special tokens are left out of the text.
    """

    prompt_ids: tuple[int, ...]
    sampled_ids: tuple[int, ...]
    text: str
    stop: str | int | None
    ended: bool
    skip_special_tokens: bool

    @classmethod
    def of(cls, choice: dict[str, Any], prompt_ids: list[int], skip_special_tokens: bool) -> Returned:
        """Return what a choice of OpenAI's API holds, asked for with ``return_token_ids``."""
        text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
        ended = choice["finish_reason"] == "stop"
        ids = tuple(choice["token_ids"])
        return cls(tuple(prompt_ids), ids, text, choice.get("stop_reason"), ended, skip_special_tokens)


def returned_ids(tokenizer: PreTrainedTokenizerBase, response: Returned) -> tuple[int, ...]:
    """Return the tokens of the response's text, for the critic's state after the whole of it.

    The token that ended the response is left out: a state after it never occurs in training. Where a stop string begins
    inside a token, what the text has of that token is tokenized anew.
    """
    ids, text = response.sampled_ids, response.text
    if not response.ended:
        return ids
    if response.stop is None:
        return ids[:-1]
    context = response.prompt_ids[-CONTEXT:]
    before = _decoded(tokenizer, context, response)

    def decoded(count: int) -> str:
        return _decoded(tokenizer, context + ids[:count], response)[len(before) :]

    kept = len(ids)
    while kept and not text.startswith(decoded(kept)):
        kept -= 1
    found = decoded(kept)
    while kept and decoded(kept - 1) == found:  # tokens without a text: special ones
        kept -= 1
    return ids[:kept] + tuple(tokenizer(text[len(found) :], add_special_tokens=False)["input_ids"])


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], response: Returned) -> str:
    skip = response.skip_special_tokens
    text = tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
