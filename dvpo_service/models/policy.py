"""The policy as the trainer uses it: log-probs and entropy of given responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dvpo_service.algo.chunked_logprobs import chunked_logprobs
from dvpo_service.models.head import Head, body_of
from dvpo_service.models.packing import pack


class PolicyModel(nn.Module):
    """A Hugging Face causal LM whose forward pass scores responses.

    Only the states that predict a response token go through the output layer, a chunk at a time, so that the logits of
    all tokens never exist together.
    """

    def __init__(self, lm: nn.Module, *, temperature: float, packing: bool = False):
        super().__init__()
        self.backbone = lm
        self.temperature = temperature
        self.packing = packing

    def forward(
        self, tokens: Tensor, prompt_lens: Tensor, lengths: Tensor, num_tokens: int, *, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs and entropies of the response tokens, under the sampling temperature.

        Args:
          tokens: [B, S], prompt then response, right-padded.
          prompt_lens, lengths: [B], prompt tokens, and prompt + response tokens.
          num_tokens: T, the length of the longest response.
          with_entropy: False skips the entropies.

        Returns:
          (log-probs, entropies or None), both [B, T] float32; 0 past a response's end.
        """
        steps = torch.arange(num_tokens, device=tokens.device)
        valid = steps < (lengths - prompt_lens)[:, None]
        positions = prompt_lens[:, None] - 1 + steps  # of the states that predict a response token
        output, hidden = self._hidden(tokens, lengths, positions, valid)
        targets = tokens.gather(1, (positions + 1).clamp(max=tokens.shape[1] - 1))[valid]
        head = Head(self.backbone, output)
        logprobs, entropies = chunked_logprobs(
            hidden,
            targets,
            head,
            head.parameters(),
            temperature=self.temperature,
            with_entropy=with_entropy,
        )
        blank = torch.zeros(valid.shape, dtype=logprobs.dtype, device=tokens.device)
        wide = [None if x is None else blank.masked_scatter(valid, x) for x in (logprobs, entropies)]
        return wide[0], wide[1]  # type: ignore[return-value]

    def _hidden(self, tokens: Tensor, lengths: Tensor, positions: Tensor, valid: Tensor) -> tuple[Any, Tensor]:
        """Return the body's output, and of its states those at ``positions`` that are ``valid``, [R, D]."""
        body = body_of(self.backbone)
        if self.packing:
            row = pack(tokens, lengths)
            output = body(**row.inputs(), use_cache=False)
            return output, output.last_hidden_state[0, row.index(positions, lengths)[valid]]
        output = body(input_ids=tokens, use_cache=False)  # no mask: nothing looks ahead at the padding on the right
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(valid)
        return output, output.last_hidden_state[rows[valid], positions[valid]]
