"""Sequences end to end instead of padded: the backbone computes nothing for padding.

A packed row has restarting ``position_ids`` and no attention mask; transformers reads the borders from
them (block-diagonal masks for eager and SDPA, variable lengths for flash attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """N tokens of B sequences in one row: ``tokens`` and ``positions`` [1, N], ``starts`` [B]."""

    tokens: Tensor
    positions: Tensor
    starts: Tensor

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.tokens, "position_ids": self.positions}

    def index(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Where token ``positions[b, t]`` of sequence b stands in the row, [B, T]; past its end: at its end."""
        return self.starts[:, None] + torch.minimum(positions, lengths[:, None] - 1)


def pack(tokens: Tensor, lengths: Tensor) -> Packed:
    """Right-padded tokens [B, S] and lengths [B] -> one row."""
    steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    valid = steps < lengths[:, None]
    return Packed(tokens[valid][None], steps[valid][None], lengths.cumsum(0) - lengths)
