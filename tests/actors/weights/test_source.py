"""Weights leave the trainer as a checkpoint on disk has them: names, shapes, values, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from actors.weights.source import CheckpointSource
from dvpo_service.models.load import load_causal_lm

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen2": hf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "phi3": hf.Phi3Config(**SMALL),
    "mixtral": hf.MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3_moe": hf.Qwen3MoeConfig(**SMALL, num_experts=3, moe_intermediate_size=16, head_dim=16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_values_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    source = CheckpointSource(load_causal_lm(str(tmp_path)), torch.float32)
    sent = list(source)
    assert len(sent) == len(expected)
    for key, tensor in sent:
        assert torch.equal(tensor, expected[key]), key
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(k, t.dtype, tuple(t.shape)) for k, t in sent]


def test_weights_are_sent_in_the_engines_precision(tmp_path: Path) -> None:
    hf.AutoModelForCausalLM.from_config(CONFIGS["qwen2"]).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path))
    source = CheckpointSource(model, torch.bfloat16)
    sent = dict(source)
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() * t.element_size() for t in sent.values()) == 2 * parameters
    assert {m.dtype for m in source.metadata()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(sent[name], model.get_parameter(name).bfloat16())
