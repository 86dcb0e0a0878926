"""What is sampled in the process has the log-probs that plain transformers gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.in_process.sampler import InProcessEngine
from dvpo_service.models.load import load_causal_lm, load_tokenizer
from dvpo_service.types import Prompt, Sampling

PROMPTS = [Prompt(i, ({"role": "user", "content": "?"},), "1", "t", tuple(range(2, 4 + 3 * i))) for i in range(5)]


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> Any:
    return load_causal_lm(str(tiny_model)).eval()


@pytest.fixture
def engine(lm: Any, tiny_model: Path) -> InProcessEngine:
    return InProcessEngine(lm, load_tokenizer(str(tiny_model)), 12)


def plain(lm: Any, prompt: Prompt, tokens: tuple[int, ...], sampling: Sampling) -> torch.Tensor:
    """Return the log-probs of ``tokens`` in float64 arithmetic on the logits of one forward pass."""
    ids = torch.tensor([prompt.token_ids + tokens])
    with torch.no_grad():
        logits = lm(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1].double()
    logits = logits / (sampling.temperature or 1.0)
    if sampling.top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize(
    "sampling", [Sampling(3, 1.0, 1.0, -1, 9), Sampling(3, 0.7, 1.0, 20, 9), Sampling(1, 0.0, 1.0, -1, 9)]
)
def test_tokens_have_the_log_probs_of_the_distribution_they_come_from(
    engine: InProcessEngine, lm: Any, sampling: Sampling
) -> None:
    groups = engine.generate(PROMPTS, sampling, run_seed=0, step=1)
    assert [[s.prompt_index for s in g] for g in groups] == [[i] * sampling.n for i in range(5)]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert [s.sample_index for s in group] == list(range(sampling.n))
        for sample in group:
            assert torch.tensor(sample.logprobs).double() == pytest.approx(
                plain(lm, prompt, sample.token_ids, sampling), abs=1e-5
            )


def test_greedy_takes_the_likeliest_token(engine: InProcessEngine, lm: Any) -> None:
    [[sample]] = engine.generate(PROMPTS[:1], Sampling(1, 0.0, 1.0, -1, 5), run_seed=0, step=1)
    ids = torch.tensor([PROMPTS[0].token_ids + sample.token_ids])
    with torch.no_grad():
        best = lm(input_ids=ids).logits[0, len(PROMPTS[0].token_ids) - 1 : -1].argmax(-1)
    assert best.tolist() == list(sample.token_ids)


def test_a_response_ends_at_its_end_token(engine: InProcessEngine, lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the vocabulary ends a response, so that many do."""
    monkeypatch.setattr(lm.generation_config, "eos_token_id", list(range(0, 260, 2)))
    samples = [s for g in engine.generate(PROMPTS, Sampling(8, 1.0, 1.0, -1, 6), run_seed=0, step=1) for s in g]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for s in samples:
        assert len(s.token_ids) == len(s.logprobs)
        ends = [t % 2 == 0 or t == engine.tokenizer.eos_token_id for t in s.token_ids]
        assert ends == [False] * (len(ends) - 1) + [s.finish_reason == "stop"]


def test_the_same_step_is_sampled_alike_and_another_is_not(engine: InProcessEngine) -> None:
    sampling = Sampling(4, 1.0, 1.0, -1, 8)
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, sampling, run_seed=0, step=1)
    assert torch.equal(torch.get_rng_state(), state), "the process's own random numbers are left alone"
    assert engine.generate(PROMPTS, sampling, run_seed=0, step=1) == first
    assert engine.generate(PROMPTS, sampling, run_seed=0, step=2) != first
    assert engine.generate(PROMPTS, sampling, run_seed=1, step=1) != first
    tokens = [s.token_ids for s in first[4]]
    assert len(set(tokens)) == len(tokens), "samples of a prompt differ"


def test_a_model_in_training_mode_samples_with_its_cache_and_is_left_as_it_was(
    engine: InProcessEngine, lm: Any
) -> None:
    lm.train()
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        engine.generate(PROMPTS, Sampling(1, 1.0, 1.0, -1, 4), run_seed=0, step=1)
        assert lm.training
    finally:
        lm.gradient_checkpointing_disable()
        lm.eval()
