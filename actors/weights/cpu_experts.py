"""Mixture-of-experts layers of vLLM on a CPU whose weights can be updated in place.

vLLM replaces the weights of a mixture's experts by copies packed for its CPU kernel. New weights would be copied,
unpacked, into the packed layout: another model, without an error. ``keep_unpacked`` leaves the weights as they were
loaded, and packs a copy beside them; ``repack`` renews the copies after an update.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def keep_unpacked() -> None:
    """Have vLLM's CPU experts keep their loaded weights. Call it before a model is built. Idempotent."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts as Experts

    pack, apply = Experts.process_weights_after_loading, Experts.apply
    if pack.__module__ == __name__:
        return

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        layer._dvpo_pack = partial(_packed, self, layer, pack)
        layer._dvpo_packed = self._dvpo_packed = layer._dvpo_pack()

    def apply_packed(self: Any, *, w1: Tensor, w2: Tensor, **inputs: Any) -> None:
        packed_w1, packed_w2 = self._dvpo_packed
        apply(self, w1=packed_w1, w2=packed_w2, **inputs)

    Experts.process_weights_after_loading = process_weights_after_loading  # type: ignore[method-assign]
    Experts.apply = apply_packed  # type: ignore[method-assign, assignment]


def repack(model: nn.Module) -> None:
    """Renew the packed copies of all experts in ``model``, in place."""
    for _, layer in _expert_layers(model):
        for old, new in zip(layer._dvpo_packed, layer._dvpo_pack(), strict=True):
            old.copy_(new)


def not_updatable(model: nn.Module) -> list[str]:
    """Return the names of layers whose biases vLLM has padded: an update would not fit them."""
    return [
        name
        for name, layer in _expert_layers(model)
        if hasattr(layer, "w13_bias") and layer.w13_bias.shape[1] != layer.w13_weight.shape[1]
    ]


def _expert_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "_dvpo_pack")]


@torch.no_grad()
def _packed(experts: Any, layer: Any, pack: Callable[[Any, Any], None]) -> tuple[Tensor, Tensor]:
    """Return packed copies of a layer's weights; the layer keeps its own."""
    stand_in: Any = nn.Module()
    stand_in.moe_config, stand_in.activation = layer.moe_config, layer.activation
    for name, parameter in layer.named_parameters(recurse=False):
        stand_in.register_parameter(name, parameter)
    pack(experts, stand_in)
    return stand_in.w13_weight.data, stand_in.w2_weight.data
