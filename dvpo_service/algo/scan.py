"""The linear recurrence ``x_s = b_s + c_s x_{s-1}`` over the valid tokens of each sequence, without a loop over T.

A sequence's valid tokens are packed *last first*: slot s = 0 holds the last valid token, s = 1 the valid token before
it, and so on; the remaining slots are unused. So the backward recursions of reinforcement learning run forward, every
row starts at slot 0 whatever its length, and a masked token (padding, tool output) is only where nothing reads it. A
row's result therefore depends, bit for bit, on its own valid tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # fixed, and not sqrt(T), because the rounding must not depend on how far a batch is padded


class LastFirst:
    """The valid tokens of a mask [B, T], numbered from the last one. Its methods take [B, T] and [B, T, M] tensors."""

    def __init__(self, mask: Tensor):
        b, t = mask.shape
        self.mask = mask
        later = mask.flip(1).cumsum(1).flip(1) - mask.long()  # a valid token's slot: how many valid tokens follow it
        position = torch.arange(t, device=mask.device).expand(b, t)
        slot = torch.where(mask, later, t)  # masked tokens share slot t, which is cut off
        take = later.new_zeros(b, t + 1).scatter_(1, slot, position)[:, :t]
        self._take, self._slot = self._flat(take), self._flat(later)
        self._take_previous = self._flat(torch.cat((take[:, :1], take[:, :-1]), 1))

    def pack(self, x: Tensor) -> Tensor:
        """Return ``x`` in slot order. Unused slots repeat token 0."""
        return _rows(x, self._take)

    def pack_following(self, x: Tensor, end: Tensor) -> Tensor:
        """Return, in each token's slot, ``x`` of the *next* valid token; the last token gets ``end`` [B, ...]."""
        following = _rows(x, self._take_previous)
        following[:, :1] = end.unsqueeze(1)
        return following

    def unpack(self, packed: Tensor) -> Tensor:
        """Return ``packed``, which is in slot order, in token order; 0 where masked."""
        out = _rows(packed, self._slot)
        return out.masked_fill_(~self.mask.reshape(*self.mask.shape, *(1 for _ in out.shape[2:])), 0)

    @staticmethod
    def _flat(index: Tensor) -> Tensor:
        b, t = index.shape
        return (index + t * torch.arange(b, device=index.device).unsqueeze(1)).reshape(-1)


def linear_scan(b: Tensor, c: Tensor, start: Tensor) -> Tensor:
    """Solve ``x_s = b_s + c_s x_{s-1}`` along axis 1, with ``x_{-1} = start``.

    The result is exact to rounding for every c, 0 included. The scan has three stages. It first solves every chunk of
    ``CHUNK`` steps from 0, all chunks at once. It then computes the values at the ends of the chunks, one after
    another. Last it adds to each step its share of the value before its chunk. That takes ``CHUNK + S / CHUNK``
    dependent steps in place of S, and twice the work. All operations are elementwise products and sums, so neither
    autocast nor TF32 affects them, and no value (in particular no NaN) reaches a smaller s.

    Args:
      b: [B, S, ...], float32 or better.
      c: like ``b``, or of size 1 in the axes after S.
      start: [B, ...].

    Returns:
      x, like ``b``.
    """
    steps = b.shape[1]
    chunk = max(1, min(CHUNK, steps))
    x, c = _chunked(b, chunk), _chunked(c, chunk)
    if steps:
        x[:, 0, 0].addcmul_(c[:, 0, 0], start)
    share = c.clone()  # becomes the product of c since the chunk's first step: the share of the value before the chunk
    for i in range(1, chunk):
        x[:, :, i].addcmul_(c[:, :, i], x[:, :, i - 1])
        share[:, :, i].mul_(share[:, :, i - 1])
    for n in range(1, x.shape[1]):
        x[:, n, -1].addcmul_(share[:, n, -1], x[:, n - 1, -1])
    x[:, 1:, :-1].addcmul_(share[:, 1:, :-1], x[:, :-1, -1:])
    return x.flatten(1, 2)[:, :steps]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of ``x`` [B, T, ...], in the shape of ``x``, by their number in B x T."""
    return x.flatten(0, 1).index_select(0, index).view(x.shape)


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """Return a copy of ``x`` [B, S, ...] as [B, number, chunk, ...], with zeros where the last chunk is not full."""
    b, steps, *rest = x.shape
    number = -(-steps // chunk)
    out = x.new_empty(b, number * chunk, *rest)
    out[:, :steps] = x
    out[:, steps:] = 0
    return out.unflatten(1, (number, chunk))
