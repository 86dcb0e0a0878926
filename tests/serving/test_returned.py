"""The critic values the text that is returned, whatever ended the response."""

from __future__ import annotations

import pytest

from dvpo_service.models.small import EOS, character_tokenizer
from dvpo_service.serving.returned import Returned, returned_ids

TOKENIZER = character_tokenizer()
END = TOKENIZER.eos_token_id


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("sampled", "text", "stop", "valued"),
    [
        ((*ids("29"), END), "29", None, ids("29")),  # the end-of-sequence token
        (ids("29;more"), "29", ";more", ids("29")),  # a stop string of many tokens is not in the text
        (ids("29;"), "29;", ";", ids("29;")),  # include_stop_str_in_output
        (ids("294"), "29", ids("4")[0], ids("29")),  # stop_token_ids
        (ids("294"), "294", ids("4")[0], ids("294")),  # the same with include_stop_str_in_output
        ((*ids("29"), END), "29", END, ids("29")),  # a further end-of-sequence token of the generation config
        (ids("aé;"), "aé", ";", ids("aé")),  # a character of two tokens
        (ids(";"), "", ";", ()),
    ],
)
def test_the_valued_tokens_are_those_of_the_text(
    sampled: tuple[int, ...], text: str, stop: str | int | None, valued: tuple[int, ...]
) -> None:
    response = Returned(ids("12+17="), sampled, text, stop, ended=True, skip_special_tokens=True)
    assert returned_ids(TOKENIZER, response) == valued


def test_special_tokens_that_are_shown_are_text_too() -> None:
    sampled = (*ids("2"), END, *ids("9;"))
    response = Returned(ids("1="), sampled, f"2{EOS}9", ";", ended=True, skip_special_tokens=False)
    assert returned_ids(TOKENIZER, response) == sampled[:-1]


def test_a_response_cut_at_its_length_is_valued_whole() -> None:
    response = Returned(ids("1="), ids("2345"), "2345", None, ended=False, skip_special_tokens=True)
    assert returned_ids(TOKENIZER, response) == ids("2345")


def test_a_token_that_the_stop_string_begins_in_is_tokenized_anew() -> None:
    """A tokenizer with merges: "ab" is one token, of which the text has only "a"."""
    from transformers import Qwen2Tokenizer

    vocab = TOKENIZER.get_vocab()
    merged = Qwen2Tokenizer(vocab=vocab | {"ab": len(vocab)}, merges=[("a", "b")], eos_token=EOS, unk_token=None)
    sampled = tuple(merged("2ab", add_special_tokens=False)["input_ids"])
    assert len(sampled) == 2
    response = Returned(ids("1="), sampled, "2a", "b", ended=True, skip_special_tokens=True)
    assert returned_ids(merged, response) == ids("2a")
