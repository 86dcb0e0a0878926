"""The warm start's losses against sums written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen2ForCausalLM

from dvpo_service.data.judged import JudgedAnswer
from dvpo_service.models.small import small_config
from dvpo_service.objectives.supervised import answer_loss, judgement_loss

RIGHT, WRONG = 40, 41
BATCH = [
    JudgedAnswer([2, 10, 11], [20, 21, 1], [True, False, True]),
    JudgedAnswer([2, 12], [22, 1], [False, False]),
]


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(small_config(hidden_size=32, num_layers=2, num_heads=1, max_positions=32)).eval()


def test_judgements(model: Qwen2ForCausalLM) -> None:
    loss, good = judgement_loss(model, BATCH, (RIGHT, WRONG))
    shares = [[1.0, 0.5, 2 / 3], [0.0, 0.0]]
    total, near = 0.0, 0.0
    for row, wanted in zip(BATCH, shares, strict=True):
        logits = model(input_ids=torch.tensor([row.prompt + row.answer])).logits[0, len(row.prompt) :].double()
        for at, share in zip(logits, wanted, strict=True):
            two = at[[RIGHT, WRONG]].log_softmax(0)
            total -= float(share * two[0] + (1 - share) * two[1])
            near += 1 - abs(float(two[0].exp()) - share)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    assert float(good) == pytest.approx(near, rel=1e-5)


def test_judging_pulls_at_two_tokens_of_the_output_layer_only(model: Qwen2ForCausalLM) -> None:
    model.zero_grad()
    judgement_loss(model, BATCH, (RIGHT, WRONG))[0].backward()
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [RIGHT, WRONG]


def test_demonstrations(model: Qwen2ForCausalLM) -> None:
    pairs = [(row.prompt, row.answer) for row in BATCH]
    loss, _ = answer_loss(model, pairs, 0.0)
    total = 0.0
    for prompt, answer in pairs:
        logprobs = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["answers", "judgements"])
def test_a_rank_without_rows_takes_part_with_a_loss_of_zero(model: Qwen2ForCausalLM, kind: str) -> None:
    loss, right = answer_loss(model, [], 0.0) if kind == "answers" else judgement_loss(model, [], (RIGHT, WRONG))
    loss.backward()
    assert (float(loss.detach()), float(right)) == (0.0, 0.0)
    assert all(p.grad is not None and math.isfinite(float(p.grad.sum())) for p in model.model.parameters())
