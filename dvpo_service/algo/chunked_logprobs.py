"""Log-probs and entropies from hidden states, without ever holding the logits of all tokens.

Logits are by far the largest tensor of a training step: in float32, 8,192 tokens at a vocabulary of 152,064 are 5 GB a
copy, and the plain form needs several. Here the rows go through the output layer a few at a time, in the forward pass
and again in the backward pass. ``policy_loss.token_logprobs`` and ``entropy`` are the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dvpo_service.algo.masks import float32_or_better

# The float32 logits of a chunk. Three or four tensors of this size exist at a time. With smaller chunks the output
# layer's weights are read, and their gradients added up, more often.
CHUNK_BYTES = 2**27

Head = Callable[[Tensor], Tensor]


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    parameters: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``log softmax(head(hidden) / temperature)[target]`` and the entropy of each row.

    Gradients flow from both to ``hidden`` and to ``parameters``, at first order only. Where no loss is made of the
    entropies, the backward pass does nothing for them. The parameters' gradients are added up in float32 or better.

    Args:
      hidden: [R, D].
      targets: [R] int64.
      head: maps [r, D] to logits [r, V]. Each row of its result depends on the same row only.
      parameters: all that ``head`` uses, at least. Those that it does use get a gradient even if R is 0, because
        FSDP's ranks must reduce the same tensors.
      with_entropy: False skips the entropies.
      rows: the size of a chunk; by default as many as fit ``CHUNK_BYTES``, which the first row's logits tell.

    Returns:
      (log-probs [R], entropies [R] or None), in float32 or better.
    """
    logprobs, entropies = _ChunkedLogprobs.apply(hidden, targets, head, temperature, with_entropy, rows, *parameters)
    return logprobs, entropies if with_entropy else None


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        temperature: float,
        with_entropy: bool,
        rows: int | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        rows = rows or _chunk_rows(hidden, head)
        for i in range(0, len(hidden), rows):
            part = slice(i, i + rows)
            scores = torch.log_softmax(_scaled(head(hidden[part]), temperature), dim=-1)
            logprobs[part] = scores.gather(1, targets[part, None])[:, 0]
            if with_entropy:
                p = scores.exp()
                entropies[part] = -scores.clamp_(min=-1e4).mul_(p).sum(-1)  # the clamp: see policy_loss.entropy
                del p
            del scores  # or two chunks would exist at a time
        ctx.save_for_backward(hidden, targets, entropies)
        # Not among the saved tensors: a hook may replace those, and the gradient is asked for by identity.
        ctx.parameters = parameters
        ctx.head, ctx.temperature, ctx.rows = head, temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, entropies = ctx.saved_tensors
        needed = [p for p, need in zip(ctx.parameters, ctx.needs_input_grad[6:], strict=True) if need]
        sums: dict[int, Tensor] = {}
        to_hidden = torch.zeros_like(hidden)
        for i in range(0, max(1, len(hidden)), ctx.rows):  # also without a row: the head's parameters need their zeros
            part = slice(i, i + ctx.rows)
            with torch.enable_grad():
                x = hidden[part].detach().requires_grad_()
                logits = ctx.head(x)
            of_logprob, of_entropy = (None if s is None else s[part, None] for s in slopes)
            slope = _slope(logits, targets[part, None], entropies[part, None], of_logprob, of_entropy, ctx.temperature)
            to_hidden[part], *others = torch.autograd.grad(logits, [x, *needed], slope, allow_unused=True)
            for parameter, more in zip(needed, others, strict=True):
                _add(sums, id(parameter), more)
            del logits, slope, others
        grads = [sums[id(p)].to(p.dtype) if id(p) in sums else None for p in ctx.parameters]
        return (to_hidden, None, None, None, None, None, *grads)


def _add(sums: dict[int, Tensor], key: int, more: Tensor | None) -> None:
    """Add to a running sum, which is in float32 or better from the second term on."""
    if more is not None:
        sums[key] = float32_or_better(sums[key]).add_(more) if key in sums else more


def _chunk_rows(hidden: Tensor, head: Head) -> int:
    if not len(hidden):
        return 1
    width = head(hidden[:1]).shape[-1]
    return max(1, CHUNK_BYTES // (4 * width))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return ``logits / temperature`` in float32 or better, without their graph."""
    logits = float32_or_better(logits.detach())
    return logits if temperature == 1.0 else logits / temperature


def _slope(
    logits: Tensor,
    targets: Tensor,
    entropies: Tensor,
    of_logprob: Tensor | None,
    of_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return the derivative with respect to the logits [r, V], in their precision.

    With p = softmax(logits / temperature), ``d log p_t = (1[v = t] - p_v)`` and ``d H = -p_v (log p_v + H)``, each over
    the temperature. All other arguments are [r, 1].
    """
    slope = torch.log_softmax(_scaled(logits, temperature), dim=-1)
    if of_entropy is None:
        assert of_logprob is not None, "autograd calls a function backward for some output"
        slope.exp_().mul_(-of_logprob)
    else:
        p = slope.exp()
        slope.clamp_(min=-1e4).add_(entropies).mul_(of_entropy)  # the clamp: see policy_loss.entropy
        if of_logprob is not None:
            slope.add_(of_logprob)
        slope.mul_(p).neg_()
        del p
    if of_logprob is not None:
        slope.scatter_add_(1, targets, of_logprob)
    return slope.div_(temperature).to(logits.dtype)
