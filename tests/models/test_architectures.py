"""Policy and critic of many architectures, padded and packed, against plain transformers on each sequence alone."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dvpo_service.algo.policy_loss import entropy, token_logprobs
from dvpo_service.models.critic import DistributionalCritic, response_positions
from dvpo_service.models.policy import PolicyModel
from dvpo_service.types import Rollouts
from tests.builders import make_rollouts

SIZES = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "gemma2": {"final_logit_softcapping": 0.5, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "phi": {"num_key_value_heads": 2},  # a bias in the output layer
    "mixtral": {"num_local_experts": 2, "output_router_logits": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},  # ALiBi in place of positions
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48},
    "gemma3": {  # a language model beside one for images, which gets no gradient
        "text_config": SIZES | {"sliding_window": 4},
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
}
ROTARY = ("llama", "qwen2", "mistral", "gemma2", "cohere", "granite")  # positions as an argument, so they can be packed


def causal_lm(kind: str) -> Any:
    """Return a small model of random weights, large enough that log-probs are far from uniform."""
    torch.manual_seed(0)
    sizes = {} if "text_config" in KINDS[kind] else SIZES
    config = AutoConfig.for_model(kind, **(sizes | KINDS[kind]))
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return lm


def arguments(rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor, int]:
    lengths = rollouts.prompt_lens + rollouts.response_lens
    return rollouts.tokens, rollouts.prompt_lens, lengths, rollouts.response_mask.shape[1]


def alone(lm: Any, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the plain log-probs and entropies of each response token, end to end, [R]."""
    logprobs, entropies = [], []
    for row in range(len(rollouts)):
        prompt, length = int(rollouts.prompt_lens[row]), int(rollouts.response_lens[row])
        tokens = rollouts.tokens[row : row + 1, : prompt + length]
        logits = lm(input_ids=tokens).logits[:, prompt - 1 : -1].float() / temperature
        logprobs.append(token_logprobs(logits, tokens[:, prompt:])[0])
        entropies.append(entropy(logits)[0])
    return torch.cat(logprobs), torch.cat(entropies)


def valid(rollouts: Rollouts) -> Tensor:
    return torch.arange(rollouts.response_mask.shape[1]) < rollouts.response_lens[:, None]


@pytest.mark.parametrize(("kind", "packing"), [*((k, False) for k in KINDS), *((k, True) for k in ROTARY)])
def test_a_batch_has_the_values_and_gradients_of_each_sequence_alone(kind: str, packing: bool) -> None:
    lm, rollouts = causal_lm(kind), make_rollouts()
    results = []
    for batch in (True, False):
        lm.zero_grad()
        if batch:
            logprobs, entropies = PolicyModel(lm, temperature=0.7, packing=packing)(*arguments(rollouts))
            logprobs, entropies = logprobs[valid(rollouts)], entropies[valid(rollouts)]
        else:
            logprobs, entropies = alone(lm, rollouts, 0.7)
        (logprobs.sum() + 0.5 * entropies.square().sum()).backward()
        gradients = [p.grad.flatten() for p in lm.parameters() if p.grad is not None]
        results.append((logprobs.detach(), entropies.detach(), torch.cat(gradients)))
    for mine, plain in zip(*results, strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(mine, plain, atol=1e-4 * float(plain.abs().max()), rtol=1e-4)


def sdpa_masks(module: torch.nn.Module, *args: Any) -> list[tuple[bool, bool]]:
    """Return, for each call of SDPA, whether it gets a mask, and whether it is told to be causal."""
    calls: list[tuple[bool, bool]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*given: Any, **options: Any) -> Tensor:
        calls.append((options.get("attn_mask") is not None, bool(options.get("is_causal"))))
        return plain(*given, **options)

    with patch("torch.nn.functional.scaled_dot_product_attention", watched), torch.no_grad():
        module(*args)
    return calls


@pytest.mark.parametrize(
    ("kind", "packing", "masked"),
    [("llama", False, False), ("qwen2", False, False), ("llama", True, True), ("mistral", False, True)],
)
def test_right_padding_needs_no_mask(kind: str, packing: bool, masked: bool) -> None:
    """Without a mask SDPA can take its flash kernel. Packing and a sliding window do need one."""
    lm, rollouts = causal_lm(kind), make_rollouts()
    tokens, prompt_lens, lengths, columns = arguments(rollouts)
    expected = [(masked, not masked)] * 2
    assert sdpa_masks(PolicyModel(lm, temperature=1.0, packing=packing), *arguments(rollouts)) == expected
    critic = DistributionalCritic(lm.model, width=8, num_heads=1, num_quantiles=4, seed=0, packing=packing)
    positions = response_positions(prompt_lens, columns + 1, tokens.shape[1])
    assert sdpa_masks(critic, tokens, lengths, positions) == expected
