"""The policy's weights as its checkpoint on disk has them: the names and shapes that an engine loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, materialize_full_tensor

_LAYER = re.compile(r"^.*?\.\d+\.")


class CheckpointSource(WeightSource):
    """Every parameter of a Hugging Face model, whole, under the names that ``save_pretrained`` would write.

    transformers keeps some weights in another form than checkpoints do: it joins a mixture's experts into one tensor
    (``mlp.experts.gate_up_proj``), where the checkpoint, and so the engine, has three for each expert. The weights of a
    layer are gathered and converted together, so no more than one layer is whole at a time.

    Args:
      model: the Hugging Face model; its parameters may be sharded. Iterating is then a collective.
      dtype: what the engine computes in. Weights are sent in it.
    """

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model, self.dtype = model, dtype

    def metadata(self) -> list[ParamMeta]:
        """Return name, dtype and shape of every weight, in the order of iteration, without gathering any."""
        empty = ((name, torch.empty(p.shape, device="meta")) for name, p in self.model.named_parameters())
        return [ParamMeta(name, self.dtype, tuple(x.shape)) for name, x in self._converted(empty)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        whole = ((name, materialize_full_tensor(p).detach()) for name, p in self.model.named_parameters())
        for name, tensor in self._converted(whole):
            yield name, tensor.to(self.dtype).contiguous()

    def _converted(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for _, layer in groupby(weights, key=lambda item: _layer_of(item[0])):
            yield from revert_weight_conversion(self.model, dict(layer)).items()


def _layer_of(name: str) -> str:
    """Return what the names of one layer's parameters have in common, such as ``model.layers.3.``."""
    match = _LAYER.match(name)
    return match[0] if match else name
