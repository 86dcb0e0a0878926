"""Pictures of what the critic believes: value distributions along fixed responses."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dvpo_service.data.collate import collate
from dvpo_service.tracking.figures import FanData
from dvpo_service.types import Prompt, Rollouts, Sample, Score

_KEPT = 64  # observations for the picture over training; beyond that every second one goes


class Distributions(Protocol):
    def distributions(self, rollouts: Rollouts) -> tuple[Any, Any]: ...


class NoPictures:
    """For estimators without a distribution to show."""

    def observe(self, step: int) -> None: ...


class FanObserver:
    """Two fixed responses per prompt, through training: its right answer, and one that is wrong.

    A critic that has learned rises along the first and falls along the second, at the token where
    they part. A response ends after ``max_tokens``, as sampled ones do.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        critic: Distributions,
        tracker: Any,
        max_tokens: int,
    ):
        self.critic, self.tracker = critic, tracker
        self.history: list[tuple[int, list[FanData]]] = []  # (step, right and wrong answer), since this process began
        self.titles: list[str] = []
        self.texts: list[list[str]] = []
        self.outcomes: list[float] = []
        samples = []
        for prompt in prompts:
            for answer in (prompt.answer, _wrong(prompt.answer)):
                ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                ids = ids[:max_tokens]  # an answer in the data may be longer than the model reads
                samples.append(Sample(prompt.index, 0, tuple(ids), (0.0,) * len(ids), answer, "stop", 0))
                self.titles.append(f"{prompt.messages[-1]['content']} {answer}"[-60:])
                self.texts.append([str(tokenizer.decode([i])) for i in ids])
                self.outcomes.append(float(answer == prompt.answer))
        twice = [p for p in prompts for _ in range(2)]
        scores = [[Score(o, o)] for o in self.outcomes]
        self.rollouts = collate(twice, [[s] for s in samples], scores) if samples else None

    def observe(self, step: int) -> None:
        """Log pictures of this moment's critic, and of what it became over the steps observed so far."""
        if self.rollouts is None:
            return
        levels, heads = self.critic.distributions(self.rollouts)
        charts = [
            FanData(title, tokens, levels.numpy(), heads[i, : len(tokens)].numpy(), outcome)
            for i, (title, tokens, outcome) in enumerate(zip(self.titles, self.texts, self.outcomes, strict=True))
        ]
        # Of the first prompt only, and always a new list: another thread draws it.
        kept = self.history if len(self.history) < _KEPT else self.history[::2]
        self.history = [*kept, (step, charts[:2])]
        self.tracker.log_critic_pictures(step, charts, self.history)


def _wrong(answer: str) -> str:
    """The answer with its last digit (or character) changed."""
    last = answer[-1:]
    return answer[:-1] + (str((int(last) + 5) % 10) if last.isdigit() else "?")
