"""Memory of log-probs and entropies, and of their backward pass, above an output layer of 152,064 words."""

from __future__ import annotations

from typing import Any

import torch

from dvpo_service.algo.chunked_logprobs import chunked_logprobs
from dvpo_service.algo.policy_loss import entropy, token_logprobs
from dvpo_service.bench.peaks import peaks

VOCABULARY, WIDTH = 152_064, 16  # few numbers a state: the logits are what takes memory


def peak_gib(form: str, tokens: int) -> float:
    """Return the growth of a new process's memory in GiB.

    Args:
      form: ``chunked``, or ``plain``, where the logits of all tokens exist together.
    """
    return peaks(_logprobs, (form, tokens), 1)[0]["private"]


def _logprobs(form: str, tokens: int) -> Any:
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (tokens,))
    if form == "chunked":
        logprobs, entropies = chunked_logprobs(hidden, targets, head, [head.weight])
        assert entropies is not None
    else:
        logits = head(hidden)[None]
        logprobs, entropies = token_logprobs(logits, targets[None]), entropy(logits)
    (logprobs.sum() + entropies.sum()).backward()
    return head
