"""The weights of a model, whole and under the names that its files have, without the whole model in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

Named = tuple[str, Tensor]

_LAYER = re.compile(r"^.*?\.\d+\.")


def saved(module: nn.Module) -> list[Named]:
    """Return the tensors of a module's state by name, sharded as they are; one with several names under the first."""
    first: dict[int, str] = {}
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return [(name, x) for name, x in state.items() if first.setdefault(id(x), name) == name]


def shapes(tensors: Iterable[Named]) -> Iterator[Named]:
    """Yield tensors of the same names, shapes and precision without memory (on the meta device)."""
    return ((name, torch.empty(x.shape, dtype=x.dtype, device="meta")) for name, x in tensors)


def gathered(tensors: Iterable[Named]) -> Iterator[Named]:
    """Yield each tensor whole, one at a time. Collective where they are sharded."""
    return ((name, whole(x)) for name, x in tensors)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded. Collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_in_files(model: Any, tensors: Iterable[Named]) -> Iterator[Named]:
    """Yield a Hugging Face model's tensors as ``save_pretrained`` would write them, a layer at a time.

    transformers keeps some weights in another form than files do: it joins a mixture's experts into one tensor
    (``mlp.experts.gate_up_proj``), where the files have three for each expert.
    """
    for _, layer in groupby(tensors, key=lambda item: _layer_of(item[0])):
        yield from revert_weight_conversion(model, dict(layer)).items()


def _layer_of(name: str) -> str:
    """Return what the names of one layer's tensors have in common, such as ``model.layers.3.``."""
    match = _LAYER.match(name)
    return match[0] if match else name
