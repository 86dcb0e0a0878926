"""Versions, the quantile-Huber kernel, log-probs, and attention."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from dvpo_service.algo.chunked_logprobs import chunked_logprobs
from dvpo_service.algo.policy_loss import entropy, token_logprobs
from dvpo_service.algo.quantile_huber import _by_sorting
from dvpo_service.algo.quantiles import quantile_levels
from dvpo_service.bench.gpu.measure import Sizes, timed

SHAPES = ((257, 3, 200, 200), (33, 1, 500, 77), (5, 2, 1, 1), (64, 3, 30, 1))  # tokens, heads, atoms, targets
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def versions(sizes: Sizes) -> dict[str, Any]:
    """Return what is installed and the card."""
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "pydantic"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if sizes.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "gib": round(card.total_memory / 2**30, 1), "sms": card.multi_processor_count}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def kernel_tests(sizes: Sizes) -> dict[str, Any]:
    """Hold the Triton kernel against the sorted form; return the largest error by precision. Raises AssertionError."""
    from dvpo_service.algo.quantile_huber_triton import losses_and_slopes

    errors: dict[str, float] = {}
    shapes = SHAPES if sizes.device == "cuda" else ((5, 2, 6, 7), (3, 1, 1, 1))
    for dtype, tolerance in TOLERANCE.items():
        for shape in shapes:
            for delta in (1e-3, 1.0, 50.0):
                z, y, tau = _atoms(shape, dtype, sizes.device)
                for unit in (False, True):
                    fast, slow = losses_and_slopes(z, y, tau, delta, unit), _by_sorting(z, y, tau, delta, unit)
                    scale = 1.0 if unit or delta < 1 else delta
                    for a, b in zip(fast, slow, strict=True):
                        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)
                        key = str(dtype)
                        errors[key] = max(errors.get(key, 0.0), float((a - b).abs().max() / scale))
    return {"largest_error": errors}


def _atoms(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    n, h, m, k = shape
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(n, q, generator=generator, dtype=torch.float64) for q in (h * m, k))
    z[:, 0] = y[:, 0]  # ties
    z, y = z.to(device, dtype), y.to(device, dtype)
    return z, y, quantile_levels(m, "midpoint", device=z.device, dtype=dtype)


def kernel_speed(sizes: Sizes) -> dict[str, Any]:
    """Return the seconds of the kernel and of the sorted form, at three heads."""
    from dvpo_service.algo.quantile_huber_triton import losses_and_slopes

    tokens, atoms = sizes.atoms
    z, y, tau = _atoms((tokens, 3, atoms, atoms), torch.float32, sizes.device)
    kernel = timed(partial(losses_and_slopes, z, y, tau, 1.0, False), sizes.device)
    sorted_form = timed(partial(_by_sorting, z, y, tau, 1.0, False), sizes.device)
    return {"tokens": tokens, "atoms": atoms, "kernel": kernel, "sorted": sorted_form}


def logprobs(sizes: Sizes) -> dict[str, Any]:
    """Return time and memory of log-probs, entropies and their gradients, chunked and plain, and how they differ."""
    found: dict[str, Any] = {}
    head = torch.nn.Linear(sizes.hidden, sizes.vocab, bias=False, device=sizes.device, dtype=sizes.low)
    for tokens in sizes.tokens:
        hidden = torch.randn(tokens, sizes.hidden, device=sizes.device, dtype=sizes.low)
        targets = torch.randint(sizes.vocab, (tokens,), device=sizes.device)
        gradients: dict[str, Tensor] = {}

        def step(form: str, hidden: Tensor = hidden, targets: Tensor = targets, out: Any = gradients) -> None:
            leaf = hidden.clone().requires_grad_()
            if form == "chunked":
                scores, entropies = chunked_logprobs(leaf, targets, head, [head.weight])
            else:
                logits = head(leaf)[None]
                scores, entropies = token_logprobs(logits, targets[None]), entropy(logits)
            assert entropies is not None
            (scores.mean() + entropies.mean()).backward()
            out[form] = leaf.grad
            head.zero_grad()

        row: dict[str, Any] = {form: timed(partial(step, form), sizes.device, 1) for form in ("chunked", "plain")}
        if len(gradients) == 2:
            wanted = gradients["plain"].float()
            row["gradient_error"] = float((gradients["chunked"].float() - wanted).norm() / wanted.norm())
        found[str(tokens)] = row
    return found


def attention(sizes: Sizes) -> dict[str, Any]:
    """Return the seconds of attention, forward and backward: without a mask, with one, and packed in four parts."""
    found: dict[str, Any] = {}
    for tokens in sizes.long:
        shapes = ((1, h, tokens, sizes.hidden // sizes.heads) for h in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
        q, k, v = (torch.randn(s, device=sizes.device, dtype=sizes.low, requires_grad=True) for s in shapes)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=sizes.device).tril()
        parts = torch.arange(tokens, device=sizes.device) * 4 // tokens
        packed = causal & (parts[:, None] == parts)

        def run(mask: Tensor | None, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            out.sum().backward()

        forms = {"no_mask": None, "mask": causal, "packed": packed}
        found[str(tokens)] = {name: timed(partial(run, mask), sizes.device) for name, mask in forms.items()}
    return found
