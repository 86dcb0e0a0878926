"""Log-probs in chunks equal the plain form, values and gradients, and never hold all logits."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.chunked_logprobs import chunked_logprobs
from dvpo_service.algo.policy_loss import entropy, token_logprobs
from dvpo_service.bench.logprobs_memory import peak_gib

WIDTH, VOCABULARY = 6, 11


def case(rows: int, dtype: torch.dtype) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    layer = torch.nn.Linear(WIDTH, VOCABULARY)
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    return layer.to(dtype), hidden, torch.randint(VOCABULARY, (rows,), generator=generator)


def gradients(layer: torch.nn.Linear, hidden: Tensor, outputs: tuple[Any, ...], slopes: list[Tensor]) -> list[Tensor]:
    loss = sum((o * s).sum() for o, s in zip(outputs, slopes, strict=False))
    return list(torch.autograd.grad(loss, [hidden, *layer.parameters()]))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 9), st.integers(1, 10), st.sampled_from([1.0, 0.7]), st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_any_chunk_gives_the_plain_values_and_gradients(
    rows: int, chunk: int, temperature: float, use_entropy: bool, dtype: torch.dtype
) -> None:
    layer, hidden, targets = case(rows, dtype)
    logits = (layer(hidden) / temperature)[None]
    plain = (token_logprobs(logits, targets[None])[0], entropy(logits)[0])
    parts = chunked_logprobs(
        hidden, targets, layer, list(layer.parameters()), temperature=temperature, with_entropy=use_entropy, rows=chunk
    )
    slopes = [torch.randn(rows, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    tolerance = {"atol": 1e-12, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-6, "rtol": 2e-5}
    count = 2 if use_entropy else 1
    assert (parts[1] is None) == (not use_entropy)
    for a, b in zip(parts[:count], plain[:count], strict=True):
        assert_close(a, b, **tolerance)
    found = gradients(layer, hidden, parts[:count], slopes)
    for a, b in zip(found, gradients(layer, hidden, plain[:count], slopes), strict=True):
        assert_close(a, b, **tolerance)


def test_an_entropy_alone_has_its_gradient_and_minus_infinity_is_no_nan() -> None:
    layer, hidden, targets = case(5, torch.float64)

    def head(x: Tensor) -> Tensor:
        return layer(x).index_fill(-1, torch.tensor([3]), -torch.inf)

    targets = targets.masked_fill(targets == 3, 4)
    _, mine = chunked_logprobs(hidden, targets, head, list(layer.parameters()), rows=2)
    assert mine is not None
    plain = entropy(head(hidden)[None])[0]
    assert_close(mine, plain)
    ones = [torch.ones(5, dtype=torch.float64)]
    for a, b in zip(gradients(layer, hidden, (mine,), ones), gradients(layer, hidden, (plain,), ones), strict=True):
        assert a.isfinite().all()
        assert_close(a, b)


def test_the_gradient_of_weights_is_added_up_in_float32() -> None:
    layer, hidden, targets = case(512, torch.float32)
    low, states = layer.to(torch.bfloat16), hidden.bfloat16().detach().requires_grad_()
    gradient = []
    for rows in (512, 1):
        logprobs, _ = chunked_logprobs(states, targets, low, list(low.parameters()), rows=rows)
        assert logprobs.dtype == torch.float32
        gradient.append(torch.autograd.grad(logprobs.sum(), low.weight)[0])
    # One rounding of each term and one of the sum; sums in bfloat16 would be off by 1e-1.
    assert (gradient[0] - gradient[1]).norm() < 1e-2 * gradient[0].norm()


def test_a_frozen_layer_and_unused_parameters_get_no_gradient() -> None:
    layer, hidden, targets = case(4, torch.float32)
    layer.weight.requires_grad_(False)
    spare = torch.nn.Parameter(torch.zeros(3))
    logprobs, _ = chunked_logprobs(hidden, targets, layer, [*layer.parameters(), spare], rows=3)
    logprobs.sum().backward()
    assert layer.weight.grad is None
    assert spare.grad is None
    assert layer.bias.grad is not None


def test_a_thousand_tokens_of_a_large_vocabulary_take_less_than_a_gibibyte() -> None:
    assert peak_gib("chunked", 1024) < 1.0, "the plain form takes over 4"
