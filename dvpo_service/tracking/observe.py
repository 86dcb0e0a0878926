"""Draw the critic's value distributions along fixed responses, during training."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dvpo_service.data.collate import collate
from dvpo_service.tracking.figures import FanData
from dvpo_service.types import Prompt, Rollouts, Sample, Score

_KEPT = 64  # observations kept for the picture over training; when there are more, every second one is dropped


class Distributions(Protocol):
    """A critic that predicts distributions: returns (levels [M], atoms [B, T, H, M])."""

    def distributions(self, rollouts: Rollouts) -> tuple[Any, Any]: ...


class NoPictures:
    """An observer for estimators that have no distribution to draw."""

    def observe(self, step: int) -> None: ...


class FanObserver:
    """Draws the critic along two fixed responses per prompt: the right answer, and a wrong one.

    The values of a critic that has learned rise along the right answer and fall along the wrong one, from the token
    where the two differ.

    Args:
      prompts: to answer; without prompts nothing is drawn.
      tokenizer: the policy's.
      critic: predicts the distributions.
      tracker: logs the pictures.
      max_tokens: responses are cut to this length, as sampled ones are.
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
        self.history: list[tuple[int, list[FanData]]] = []  # (step, [right answer, wrong answer])
        self.titles: list[str] = []
        self.texts: list[list[str]] = []
        self.outcomes: list[float] = []
        samples = []
        prompts = [p for p in prompts if isinstance(p.answer, str)]  # a list of tests is no response
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
        """Log pictures of the critic now, and of how it changed over the steps that this process has observed."""
        if self.rollouts is None:
            return
        levels, heads = self.critic.distributions(self.rollouts)
        charts = [
            FanData(title, tokens, levels.numpy(), heads[i, : len(tokens)].numpy(), outcome)
            for i, (title, tokens, outcome) in enumerate(zip(self.titles, self.texts, self.outcomes, strict=True))
        ]
        # Only the first prompt is kept. The list is always a new one, because another thread draws the old one.
        kept = self.history if len(self.history) < _KEPT else self.history[::2]
        self.history = [*kept, (step, charts[:2])]
        self.tracker.log_critic_pictures(step, charts, self.history)


def _wrong(answer: str) -> str:
    """Return the answer with its last digit (or character) changed."""
    last = answer[-1:]
    return answer[:-1] + (str((int(last) + 5) % 10) if last.isdigit() else "?")
