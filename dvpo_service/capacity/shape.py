"""The size of a model from its config alone: the model is built on the meta device, without memory for its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from dvpo_service.config.pools import LoraConfig
from dvpo_service.config.schema import Config
from dvpo_service.errors import CheckpointError, one_line
from dvpo_service.models.load import check_model_folder, compute_soft_caps, quiet, text_model
from dvpo_service.models.lora import add_adapter
from dvpo_service.models.sharding import decoder_layers
from dvpo_service.models.small import small_config


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal LM that its memory depends on.

    Attributes:
      parameters: all weights; tied ones count once.
      body: those that a critic's backbone has: all but an output layer of its own.
      layer: those of the largest decoder layer.
      layers, hidden, vocab: number of decoder layers, width, and size of the output.
      saved: elements that a decoder layer keeps for its backward pass, per token.
      kv: elements of the KV cache, per token over all layers.
    """

    parameters: int
    body: int
    layer: int
    layers: int
    hidden: int
    vocab: int
    saved: int
    kv: int


def model_shape(config: Config) -> ModelShape:
    """Return the sizes of the config's model. Raises CheckpointError when its config cannot be read."""
    return shape_of(_model_config(config), trust_remote_code=config.model.trust_remote_code)


def adapter_parameters(config: Config, lora: LoraConfig | None, *, head: bool) -> int:
    """Return how many weights the adapters of the config's model have, 0 for none.

    Args:
      head: of the causal LM; otherwise of the network below its output layer.

    Raises:
      ConfigError: the model lacks the layers that ``lora`` names.
      CheckpointError: the model's config cannot be read.
    """
    if lora is None:
        return 0
    quiet()
    auto: Any = AutoModelForCausalLM if head else AutoModel
    with torch.device("meta"):
        model = auto.from_config(_model_config(config), trust_remote_code=config.model.trust_remote_code)
        model = add_adapter(model if head else text_model(model), lora, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def shape_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelShape:
    """Return the sizes of the model that ``config`` describes."""
    quiet()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    compute_soft_caps(model)
    text = config.get_text_config()
    layers = list(decoder_layers(text_model(model)))
    total = sum(p.numel() for p in model.parameters())
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    own_head = output is not None and output.weight is not embedding.weight
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        parameters=total,
        body=total - (sum(p.numel() for p in output.parameters()) if own_head else 0),
        layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        layers=len(layers),
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        saved=_saved(text, kv_heads * head_size, text.num_attention_heads * head_size),
        kv=2 * len(layers) * kv_heads * head_size,
    )


def _saved(text: PretrainedConfig, kv: int, queries: int) -> int:
    """Return the elements that a layer keeps for its backward pass, per token.

    The inputs of two norms and of the attention's output, queries, keys and values before and after rotation, and four
    of the width of the MLP that a token goes through. Norms compute in float32, which counts their inputs twice.
    """
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
    return 6 * text.hidden_size + 4 * inner + 3 * queries + 4 * kv


def _model_config(config: Config) -> PretrainedConfig:
    warm = config.model.warmstart
    if warm is not None:
        return small_config(
            hidden_size=warm.hidden_size,
            num_layers=warm.num_layers,
            num_heads=warm.num_heads,
            max_positions=warm.max_positions,
        )
    path = config.model.path
    assert path is not None
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        check_model_folder(path)
        raise CheckpointError(
            f"model.path {path}: its config.json cannot be read ({one_line(error)}); the plan needs the model's sizes: "
            "give a folder with its config.json, or a hub name with the network at hand"
        ) from error
