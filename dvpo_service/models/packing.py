"""Sequences end to end in one row instead of padded, so that the backbone computes nothing for padding.

A packed row has no attention mask. Its ``position_ids`` restart at every sequence, and transformers reads the borders
between sequences from them (block-diagonal masks for eager and SDPA, variable lengths for flash attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """N tokens of B sequences in one row.

    Attributes:
      tokens: [1, N].
      positions: [1, N], each token's position in its own sequence.
      starts: [B], where each sequence starts in the row.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Return the row as arguments of a Hugging Face model."""
        return {"input_ids": self.tokens, "position_ids": self.positions}

    def index(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Return the place in the row of token ``positions[b, t]`` of sequence b, [B, T].

        A position past the end of a sequence gives the place of its last token.
        """
        return self.starts[:, None] + torch.minimum(positions, lengths[:, None] - 1)


def pack(tokens: Tensor, lengths: Tensor) -> Packed:
    """Return right-padded ``tokens`` [B, S] with ``lengths`` [B] as one row."""
    steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    valid = steps < lengths[:, None]
    return Packed(tokens[valid][None], steps[valid][None], lengths.cumsum(0) - lengths)
