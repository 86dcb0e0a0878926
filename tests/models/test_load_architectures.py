"""What architectures have beside plain attention: soft caps, wrapped language models, lists inside of lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from dvpo_service.models.base import empty_backbone, empty_policy
from dvpo_service.models.critic import DistributionalCritic
from dvpo_service.models.load import load_backbone, load_causal_lm
from dvpo_service.models.sharding import decoder_layers

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
TOKENS = torch.arange(2, 42).view(2, 20)


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 whose attention logits are capped so low that it matters."""
    folder = tmp_path_factory.mktemp("gemma2")
    torch.manual_seed(0)
    config = hf.Gemma2Config(**SMALL, attn_logit_softcapping=1.0, query_pre_attn_scalar=16)
    hf.Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 that reads images too, with more layers for these than for text."""
    folder = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=SMALL | {"sliding_window": 8}, vision_config=vision, mm_tokens_per_image=4)
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_capped_attention_is_computed_with_its_cap(capped: Path) -> None:
    plain = hf.Gemma2ForCausalLM.from_pretrained(capped, dtype=torch.float32)
    exact = hf.Gemma2ForCausalLM.from_pretrained(capped, dtype=torch.float32, attn_implementation="eager")
    empty = empty_policy(capped)
    empty.load_state_dict(exact.state_dict())
    with torch.no_grad():
        expected = exact(TOKENS).logits
        assert not torch.allclose(plain(TOKENS).logits, expected, atol=1e-2), "the default leaves the cap out"
        torch.testing.assert_close(load_causal_lm(str(capped))(TOKENS).logits, expected)
        torch.testing.assert_close(empty(TOKENS).logits, expected)
        states = exact.model(TOKENS).last_hidden_state
        torch.testing.assert_close(load_backbone(str(capped))(TOKENS).last_hidden_state, states)


def test_a_critic_of_a_wrapped_model_is_built_on_its_language_model(wrapped: Path, tmp_path: Path) -> None:
    whole = hf.Gemma3ForConditionalGeneration.from_pretrained(wrapped, dtype=torch.float32)
    backbone = load_backbone(str(wrapped))
    with torch.no_grad():
        expected = whole.model.language_model(TOKENS).last_hidden_state
        torch.testing.assert_close(backbone(TOKENS).last_hidden_state, expected)
    assert {k for k, _ in empty_backbone(wrapped).named_parameters()} == {k for k, _ in backbone.named_parameters()}
    critic = DistributionalCritic(backbone, width=8, num_heads=2, num_quantiles=3, seed=0)
    critic.save_pretrained(tmp_path / "critic")
    again = DistributionalCritic.from_pretrained(tmp_path / "critic")
    lengths, positions = torch.tensor([20, 20]), torch.tensor([[3], [19]])
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS, lengths, positions), critic.eval()(TOKENS, lengths, positions))


def test_the_decoders_layers_are_found_though_a_layer_has_a_longer_list_of_experts() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(16))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

    decoder = Decoder()
    assert list(decoder_layers(decoder)) == list(decoder.layers)
