"""The losses of a warm start: cross-entropy on demonstrations, and judging right and wrong answers token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from dvpo_service.data.judged import JudgedAnswer

IGNORE = -100


def answer_loss(
    model: nn.Module, batch: Sequence[tuple[list[int], list[int]]], smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the answer tokens, and how many answers greedy decoding reproduces.

    Args:
      model: a causal LM.
      batch: pairs of prompt and answer tokens. If there is none, the model computes one token, because this rank still
        takes part in the other ranks' collectives.
      smoothing: label smoothing.
    """
    if not batch:
        batch = [([0], [IGNORE])]
    device = next(model.parameters()).device
    tokens = [torch.tensor(prompt + answer).clamp(min=0) for prompt, answer in batch]
    labels = [torch.tensor([IGNORE] * len(prompt) + answer) for prompt, answer in batch]
    inputs = pad_sequence(tokens, batch_first=True).to(device)
    wanted = pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(device)[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    # Where all tokens before are right, the argmax at a position is what greedy decoding gives.
    right = ((logits.argmax(-1) == wanted) | (wanted == IGNORE)).all(1) & (wanted != IGNORE).any(1)
    return loss, right.sum().to(loss.dtype)


def judgement_loss(model: nn.Module, batch: Sequence[JudgedAnswer], verdicts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the judgements at all answer tokens, and the sum of 1 - their absolute error.

    A judgement is the share of the answer's tokens so far that are right. The model makes it where it has just read a
    token, by two of its logits alone, as the odds between them: what it would write next is another question, which
    this loss leaves to ``answer_loss``.

    Args:
      model: a causal LM.
      batch: judged answers; none as in ``answer_loss``.
      verdicts: the tokens whose logits stand for right and wrong.
    """
    device = next(model.parameters()).device
    tokens = [torch.tensor(j.prompt + j.answer) for j in batch] or [torch.tensor([0])]
    labels = [torch.cat([torch.full((len(j.prompt),), math.nan), _shares(j.right)]) for j in batch]
    inputs = pad_sequence(tokens, batch_first=True).to(device)
    wanted = pad_sequence(labels or [torch.tensor([math.nan])], batch_first=True, padding_value=math.nan).to(device)
    right, wrong = verdicts
    logits = model(input_ids=inputs, use_cache=False).logits
    judged = ~wanted.isnan()
    odds, wanted = (logits[..., right] - logits[..., wrong])[judged], wanted[judged]
    loss = functional.binary_cross_entropy_with_logits(odds, wanted, reduction="sum")
    return loss, (1 - (odds.detach().sigmoid() - wanted).abs()).sum()


def _shares(right: list[bool]) -> Tensor:
    """Return the share of right tokens up to each token and with it."""
    return torch.tensor(right, dtype=torch.float32).cumsum(0) / torch.arange(1, len(right) + 1)
