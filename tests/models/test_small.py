"""The small model's tokenizer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dvpo_service.models.small import VERDICTS, character_tokenizer

TOKENIZER = character_tokenizer()


@given(st.text())
def test_no_text_has_the_tokens_of_a_judgement(text: str) -> None:
    verdicts = {TOKENIZER.get_vocab()[token] for token in VERDICTS}
    assert len(verdicts) == 2
    assert not verdicts & set(TOKENIZER(text.encode(errors="replace").decode())["input_ids"])
