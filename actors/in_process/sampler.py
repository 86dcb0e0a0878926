"""Sampling by transformers from the very model that is trained, so there are no weights to send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dvpo_service.host import stopping
from dvpo_service.rewards.seeds import sample_seed
from dvpo_service.types import Prompt, Sample, Sampling


class InProcessEngine:
    """The loop's ``Weights``, and a ``Sampler`` of the streams and the evaluation.

    Args:
      lm: the policy's causal LM, not sharded.
      tokenizer: the policy's.
      max_num_seqs: sequences that are sampled together.
    """

    def __init__(self, lm: Any, tokenizer: PreTrainedTokenizerBase, max_num_seqs: int):
        self.lm, self.tokenizer, self.max_num_seqs = lm, tokenizer, max_num_seqs
        self.version = 0

    def push(self, version: int) -> None:
        """Remember the version; the weights are here already."""
        self.version = version

    def revive(self) -> bool:
        """Return True: there is nothing that could be lost."""
        return True

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        run_seed: int,
        step: int,
        check: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        """Return ``sampling.n`` samples of every prompt, in the prompts' order.

        The random numbers depend on the run's seed, the step and the prompts, and on nothing else. Raises Stopped
        between two batches of sequences when the run is asked to stop.
        """
        groups: list[list[Sample]] = []
        size = max(1, self.max_num_seqs // sampling.n)
        for start in range(0, len(prompts), size):
            (check or stopping.check)()
            part = prompts[start : start + size]
            seed = sample_seed(run_seed, step, part[0].index, len(part), part[0].occurrence)
            groups += self._sample(part, sampling, seed)
        return groups

    def _sample(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[list[Sample]]:
        rows = [list(p.token_ids) for p in prompts for _ in range(sampling.n)]
        tokens, mask = _left_padded(rows, self.tokenizer.pad_token_id or 0, self.lm.device)
        recorder = Recorder()
        devices = [self.lm.device] if self.lm.device.type == "cuda" else []
        with _eval_mode(self.lm), torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            whole = self.lm.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=self._settings(sampling),
                logits_processor=LogitsProcessorList([*_warpers(sampling), recorder]),
            )
        sampled = whole[:, tokens.shape[1] :]
        logprobs = recorder.logprobs(sampled)
        samples = [self._row(*row) for row in zip(sampled.tolist(), logprobs.tolist(), strict=True)]
        return [
            [self._named(prompt, i, *samples[k * sampling.n + i]) for i in range(sampling.n)]
            for k, prompt in enumerate(prompts)
        ]

    def _settings(self, sampling: Sampling) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            top_k=0,  # temperature, top_k and top_p are in ``_warpers``, which ``generate`` would call after ours
            eos_token_id=self._ends,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )

    @property
    def _ends(self) -> list[int]:
        """The tokens that end a response: the tokenizer's, and those of the model's generation config."""
        given = self.lm.generation_config.eos_token_id
        return sorted({self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None})

    def _row(self, tokens: list[int], logprobs: list[float]) -> tuple[list[int], list[float], bool]:
        """Return tokens and log-probs up to the first end token, and whether there is one."""
        length = next((i + 1 for i, token in enumerate(tokens) if token in self._ends), None)
        return tokens[:length], logprobs[:length], length is not None

    def _named(self, prompt: Prompt, i: int, tokens: list[int], logprobs: list[float], ended: bool) -> Sample:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Sample(
            prompt_index=prompt.index,
            sample_index=i,
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            text=str(text),
            finish_reason="stop" if ended else "length",
            weight_version=self.version,
        )


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Return what turns logits into the scores that are sampled from, in vLLM's order."""
    warpers: list[LogitsProcessor] = []
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


class Recorder(LogitsProcessor):
    """Records the log-probs of the tokens that ``generate`` samples, under the distribution that it samples from.

    It is the last of ``generate``'s processors, and sees the scores of one step at a time: those of all steps would be
    [sequences, tokens, vocabulary].
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self._record(input_ids[:, -1])
        self._last = scores.float().log_softmax(-1)
        return scores

    def logprobs(self, sampled: Tensor) -> Tensor:
        """Return the log-probs [B, T] of the ``sampled`` tokens [B, T]; those past a response's end mean nothing."""
        if sampled.shape[1]:
            self._record(sampled[:, -1])
        return torch.stack(self._recorded, 1)

    def _record(self, tokens: Tensor) -> None:
        assert self._last is not None
        self._recorded.append(self._last.gather(1, tokens[:, None])[:, 0])


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask [B, longest]."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, (torch.arange(width, device=device) >= (width - lengths)[:, None]).long()


@contextmanager
def _eval_mode(lm: Any) -> Iterator[None]:
    """In training mode a model with gradient checkpointing keeps no KV cache."""
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)
