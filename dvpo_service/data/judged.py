"""Judged answers: right and wrong answers, with a judgement of each token.

A pretrained language model can tell a right answer from a wrong one; a small model that was trained on demonstrations
only cannot, and a critic that starts from it learns nothing of an answer but its prompt. A warm start on judged answers
makes the small model resemble the pretrained one in this (docs/algorithm.md, "A critic that knows something").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer in which some tokens may be wrong: ``right[i]`` says whether ``answer[i]`` is the reference's."""

    prompt: list[int]
    answer: list[int]
    right: list[bool]


Pair = tuple[list[int], list[int]]  # tokens of a prompt and of an answer, whose last token is the end token
Attempt = tuple[list[int], list[int], list[int]]  # tokens of a prompt, of an answer, and of the right answer


def attempts(
    demonstrations: Sequence[Pair], references: Sequence[Pair]
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt, attempted answer, right answer), for answers that are worth judging.

    They are the right answers, and the demonstrations of the same prompts, which are right or wrong in the ways of
    whoever gave them: the mistakes that the model will make, too.
    """
    right = {tuple(prompt): answer for prompt, answer in references}
    tried = [(p, a, right[tuple(p)]) for p, a in demonstrations if tuple(p) in right]
    return tried + [(p, a, a) for p, a in references]


def judged_answer(
    prompt: Sequence[int],
    attempt: Sequence[int],
    reference: Sequence[int],
    replacements: Sequence[int],
    generator: torch.Generator,
) -> JudgedAnswer:
    """Return the attempt, or, half of the time, the attempt with a share of its tokens replaced by random ones.

    The share is uniform in [0, 1], and at least one token is drawn anew. The answer ends at its first end token.

    Args:
      prompt: tokens of the prompt.
      attempt: tokens of an answer; the last one is the end token.
      reference: tokens of the right answer, with the same end token.
      replacements: tokens to draw from.
      generator: of the random numbers.
    """
    answer, end = list(attempt), reference[-1]
    if torch.rand((), generator=generator) < 0.5:
        replaced = torch.rand(len(answer), generator=generator) < torch.rand((), generator=generator)
        replaced[torch.randint(len(answer), (), generator=generator)] = True
        drawn = torch.randint(len(replacements), (len(answer),), generator=generator).tolist()
        answer = [replacements[d] if new else a for a, new, d in zip(answer, replaced.tolist(), drawn, strict=True)]
    if end in answer:
        answer = answer[: answer.index(end) + 1]
    wanted = [*reference, *[None] * len(answer)]
    return JudgedAnswer(list(prompt), answer, [a == b for a, b in zip(answer, wanted, strict=False)])
