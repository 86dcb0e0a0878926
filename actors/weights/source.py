"""The policy's weights as its checkpoint on disk has them: the names and shapes that an engine loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from dvpo_service.models.lora import merged, plain
from dvpo_service.models.whole import as_in_files, gathered, shapes


class CheckpointSource(WeightSource):
    """Every parameter of a Hugging Face model, whole, under the names that ``save_pretrained`` would write.

    Adapters are merged into the weights that they change.

    The weights of a layer are gathered and converted together, so no more than one layer is whole at a time.

    Args:
      model: the Hugging Face model; its parameters may be sharded. Iterating is then a collective.
      dtype: what the engine computes in. Weights are sent in it.
    """

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model, self.dtype = model, dtype

    def metadata(self) -> list[ParamMeta]:
        """Return name, dtype and shape of every weight, in the order of iteration, without gathering any."""
        empty = as_in_files(self.model, shapes(plain(self.model.named_parameters())))
        return [ParamMeta(name, self.dtype, tuple(x.shape)) for name, x in empty]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        weights = merged(self.model, self.model.named_parameters())
        for name, tensor in as_in_files(self.model, gathered(weights)):
            yield name, tensor.detach().to(self.dtype).contiguous()
