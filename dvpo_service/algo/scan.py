"""The linear recurrence ``x_s = b_s + c_s x_{s-1}`` over the valid tokens of each sequence, without a loop over T.

A sequence's valid tokens are packed *last first*: slot s = 0 holds the last valid token, s = 1 the one before,
and whatever is left over stands behind them all. So the backward recursions of reinforcement learning run
forward, every row starts at slot 0 whatever its length, and a masked token (padding, tool output) stands
only where nothing reads it. A row's result therefore depends, bit for bit, on its own valid tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # fixed, not sqrt(T): the rounding must not depend on how far a batch is padded


class LastFirst:
    """The order of a mask's valid tokens, counted from the end; for [B, T] and [B, T, M] alike."""

    def __init__(self, mask: Tensor):
        b, t = mask.shape
        self.mask = mask
        later = mask.flip(1).cumsum(1).flip(1) - mask.long()  # valid tokens after each one: its slot
        position = torch.arange(t, device=mask.device).expand(b, t)
        slot = torch.where(mask, later, t)  # the masked ones share a slot that is cut off
        take = later.new_zeros(b, t + 1).scatter_(1, slot, position)[:, :t]
        self._take, self._slot = self._flat(take), self._flat(later)
        self._take_previous = self._flat(torch.cat((take[:, :1], take[:, :-1]), 1))

    def pack(self, x: Tensor) -> Tensor:
        """Token order to slot order. Slots without a valid token hold whatever stands at token 0."""
        return _rows(x, self._take)

    def pack_following(self, x: Tensor, end: Tensor) -> Tensor:
        """In each token's slot, ``x`` of the *next* valid token; ``end [B, ...]`` in the last token's."""
        following = _rows(x, self._take_previous)
        following[:, :1] = end.unsqueeze(1)
        return following

    def unpack(self, packed: Tensor) -> Tensor:
        """Slot order back to token order, 0 where masked."""
        out = _rows(packed, self._slot)
        return out.masked_fill_(~self.mask.reshape(*self.mask.shape, *(1 for _ in out.shape[2:])), 0)

    @staticmethod
    def _flat(index: Tensor) -> Tensor:
        b, t = index.shape
        return (index + t * torch.arange(b, device=index.device).unsqueeze(1)).reshape(-1)


def linear_scan(b: Tensor, c: Tensor, start: Tensor) -> Tensor:
    """``x_s = b_s + c_s x_{s-1}`` along axis 1, ``x_{-1} = start``; exact to rounding for every c, 0 included.

    First every chunk of ``CHUNK`` steps from 0, all chunks at once; then the values at the chunks' ends, one
    after another; then to each step its share of the value before its chunk. That is ``CHUNK + S / CHUNK``
    dependent steps in place of S, and twice the work. Only products of c and sums occur: elementwise, so
    neither autocast nor TF32 touches them, and nothing (a NaN least of all) flows to a smaller s.

    Args:
      b: [B, S, ...], float32 or better.
      c: as ``b``, or of size 1 in the axes after S.
      start: [B, ...].

    Returns x, like ``b``.
    """
    steps = b.shape[1]
    chunk = max(1, min(CHUNK, steps))
    x, c = _chunked(b, chunk), _chunked(c, chunk)
    if steps:
        x[:, 0, 0].addcmul_(c[:, 0, 0], start)
    share = c.clone()  # product of c from the chunk's first step on: what is left of the value before it
    for i in range(1, chunk):
        x[:, :, i].addcmul_(c[:, :, i], x[:, :, i - 1])
        share[:, :, i].mul_(share[:, :, i - 1])
    for n in range(1, x.shape[1]):
        x[:, n, -1].addcmul_(share[:, n, -1], x[:, n - 1, -1])
    x[:, 1:, :-1].addcmul_(share[:, 1:, :-1], x[:, :-1, -1:])
    return x.flatten(1, 2)[:, :steps]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` [B, T, ...] by their number in B x T."""
    return x.flatten(0, 1).index_select(0, index).view(x.shape)


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """A copy as [B, number, chunk, ...], zeros where the last chunk is not full."""
    b, steps, *rest = x.shape
    number = -(-steps // chunk)
    out = x.new_empty(b, number * chunk, *rest)
    out[:, :steps] = x
    out[:, steps:] = 0
    return out.unflatten(1, (number, chunk))
