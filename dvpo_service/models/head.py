"""The output layer of a causal LM as a function of hidden states: the model's own, with its scales and soft caps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Head:
    """Maps hidden states [r, D] to logits [r, V] exactly as a Hugging Face causal LM does.

    What follows the body differs between architectures: a bias (Phi), a scale (Cohere, Granite), a soft cap (Gemma 2).
    So this calls the model's own ``forward``, with the body's output handed in.

    Args:
      lm: the causal LM.
      output: what ``body_of(lm)`` returned in this forward pass.
    """

    def __init__(self, lm: nn.Module, output: Any):
        self.lm = lm
        self.body = body_of(lm)
        self.kind = type(output)
        self.rest = {k: v for k, v in output.items() if k != "last_hidden_state"}

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self.kind(last_hidden_state=hidden[None], **self.rest)
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)  # only their shape counts
        with _returning(self.body, output):
            return self.lm(input_ids=tokens, use_cache=False).logits[0]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the head uses, among them any that it shares with the input embedding."""
        inside = {id(m) for m in self.body.modules()}
        found: dict[int, nn.Parameter] = {}
        for module in self.lm.modules():
            if id(module) not in inside:
                found |= {id(p): p for p in module.parameters(recurse=False)}
        return list(found.values())


def body_of(lm: Any) -> nn.Module:
    """Return the part of a causal LM that computes its last hidden states."""
    body = lm.get_decoder()
    return lm.model if body is lm else body  # some models do not find their own


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let calls of ``module`` return ``output`` and compute nothing."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
