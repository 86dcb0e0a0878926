"""Turn prompts into token ids."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jinja2

from dvpo_service.data.badrow import BadRow
from dvpo_service.data.dataset import BadRows, Dataset, OnBadRow
from dvpo_service.errors import ConfigError, DataError, one_line
from dvpo_service.types import Prompt

if TYPE_CHECKING:  # slow to import, and only named here
    from transformers import PreTrainedTokenizerBase


def encode_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool,
    max_prompt_tokens: int,
    on_bad_row: OnBadRow = "stop",
) -> Dataset:
    """Return the dataset with ``token_ids`` filled.

    Args:
      chat_template: apply the tokenizer's template, so that the ids end in its generation prompt; otherwise the
        messages' texts are joined as they are.
      max_prompt_tokens: the longest prompt, in tokens.
      on_bad_row: under ``skip``, prompts that cannot be encoded or are too long are left out and the rest renumbered.

    Raises:
      DataError: under ``stop``, a prompt cannot be encoded, has no tokens or has too many; or no prompt is left.
      ConfigError: ``chat_template`` is set and the tokenizer has no template.
    """
    if chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template; set data.chat_template=false"
        )
    bad = BadRows(on_bad_row, dataset.skipped_by_reason)
    prompts: list[Prompt] = []
    origins: list[str] = []
    for where, prompt in zip(dataset.origins, dataset.prompts, strict=True):
        try:
            ids = _checked_ids(prompt, tokenizer, chat_template, max_prompt_tokens)
        except BadRow as problem:
            bad.add(where, problem)
            continue
        prompts.append(replace(prompt, index=len(prompts), token_ids=ids))
        origins.append(where)
    if not prompts:
        raise DataError(f"{dataset.name}: no prompts are left; bad rows skipped: {dict(bad.counts)}")
    return replace(dataset, prompts=tuple(prompts), origins=tuple(origins), skipped_by_reason=bad.counts)


def _checked_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template: bool, limit: int
) -> tuple[int, ...]:
    try:
        ids = _ids(prompt, tokenizer, chat_template)
    except BadRow:
        raise
    except jinja2.TemplateError as error:  # e.g. a template that wants user and assistant to alternate
        raise BadRow("chat template", f"the chat template refuses the messages: {_line(error)}") from error
    # A template's own Python errors, and what tokenizers raises for text outside its vocabulary: a bare Exception.
    except Exception as error:
        raise BadRow("cannot be tokenized", f"the prompt cannot be tokenized: {_line(error)}") from error
    if not ids:
        raise BadRow("empty prompt", "the prompt has no tokens with this tokenizer")
    if len(ids) > limit:
        raise BadRow("prompt too long", f"the prompt has {len(ids)} tokens, data.max_prompt_tokens={limit}")
    return ids


def _ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> tuple[int, ...]:
    if not chat_template:
        return text_ids("".join(m["content"] for m in prompt.messages), tokenizer)
    messages = [{"role": m["role"], "content": m["content"]} for m in prompt.messages]
    # return_dict is stated because its default changed in transformers 5.
    encoding: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = tuple(encoding["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        raise BadRow(
            "chat template",
            f"the chat template ends the prompt with {tokenizer.eos_token!r}, after which there is nothing to answer; "
            "it needs a generation prompt (add_generation_prompt), or set data.chat_template=false",
        )
    return ids


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of a text that is to be continued: with the tokenizer's own start (BOS), without its end.

    Some tokenizers put EOS or SEP after every text (``add_eos_token``, T5's and BERT's): an answer after it would
    belong to another text.
    """
    whole = tuple(tokenizer(text)["input_ids"])
    bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return whole[: starts[-1] + len(bare)] if starts and bare else bare


def _line(error: Exception) -> str:
    return one_line(error, 200) or type(error).__name__
