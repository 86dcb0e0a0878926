"""Judged answers: what is wrong in them is marked wrong, and they end where an answer ends."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dvpo_service.data.judged import attempts, judged_answer

END, LETTERS = 0, [0, 5, 6, 7, 8]
ANSWERS = st.lists(st.sampled_from(LETTERS[1:]), max_size=5).map(lambda tokens: [*tokens, END])


@given(ANSWERS, ANSWERS, st.integers(0, 2**32))
def test_a_token_is_right_where_it_is_the_reference_s(attempt: list[int], reference: list[int], seed: int) -> None:
    judged = judged_answer([1, 2], attempt, reference, LETTERS, torch.Generator().manual_seed(seed))
    assert judged.prompt == [1, 2]
    assert len(judged.answer) == len(judged.right)
    assert END not in judged.answer[:-1], "nothing follows the end"
    for i, (token, right) in enumerate(zip(judged.answer, judged.right, strict=True)):
        assert right == (i < len(reference) and token == reference[i])


def test_half_of_them_are_left_as_they_are_and_the_others_are_wrong_in_any_number_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = [5, 6, 7, 8, 5, 6, 7, 8, END]
    drawn = [judged_answer([1], reference, reference, LETTERS[1:], generator) for _ in range(4000)]
    untouched = sum(judged.answer == reference for judged in drawn) / len(drawn)
    # A replaced token is the same by chance in one of four draws.
    assert 0.5 < untouched < 0.56
    full = [judged.right for judged in drawn if len(judged.right) >= 8]
    counts = {sum(right[:8]) for right in full}
    assert counts == set(range(9))


def test_demonstrations_are_judged_by_the_right_answer_to_their_prompt() -> None:
    references = [([1], [5, END]), ([2], [6, END])]
    tried = attempts([([1], [7, END]), ([3], [8, END])], references)
    assert tried == [([1], [7, END], [5, END]), ([1], [5, END], [5, END]), ([2], [6, END], [6, END])]
