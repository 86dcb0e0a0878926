"""Loading of a model that is sharded over ranks: no rank holds more than its own shard.

The model is built on the meta device, where tensors have no memory, and sharded there. transformers then reads from
the files the rows of each weight that this rank keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.distributed import DistributedConfig

from dvpo_service.errors import CheckpointError, one_line
from dvpo_service.models.load import load_backbone, load_causal_lm, load_model_config, text_model

# Wraps a Hugging Face model in the module that is trained, shards it, and returns it.
Build = Callable[[Any], Any]


def load_sharded(
    path: str,
    build: Build,
    mesh: DeviceMesh,
    *,
    head: bool,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """Return what ``build`` makes of the model at ``path``, with this rank's shard of the weights. Collective.

    Where transformers computes weights from those in the files in a way that needs whole tensors, one rank after
    another loads the whole model on the CPU, and keeps its shard.

    Args:
      build: gets the model on the meta device, or whole on the CPU; it calls ``shard``, and communicates with no rank.
      mesh: what ``build`` shards over.
      head: load the causal LM; otherwise the network below its language-model head.

    Raises:
      CheckpointError: the model cannot be loaded, or its files lack some of its weights.
    """
    load: Any = load_causal_lm if head else load_backbone
    if mesh.size() == 1 or not _reads_rows(_empty(path, head, trust_remote_code), mesh.size()):
        return in_turns(lambda: build(load(path, dtype=dtype, trust_remote_code=trust_remote_code)), mesh)
    built: list[Any] = []

    def distribute(cls: type, model: Any, *_: Any) -> Any:
        del model.config.distributed_config  # it only has transformers call this
        backbone = (model if head else text_model(model)).eval()
        built.extend((build(backbone), backbone.training))
        return model

    with patch.object(PreTrainedModel, "maybe_distribute_model", classmethod(distribute)):
        model = load(path, dtype=dtype, trust_remote_code=trust_remote_code, distributed_config=DistributedConfig())
    module, training = built
    model.train(training)  # which checkpointing takes; from_pretrained ends with eval mode
    _move_buffers(module, mesh)
    return module


def in_turns(load: Callable[[], Any], mesh: DeviceMesh) -> Any:
    """Return what ``load`` returns, which is called by one rank after another. Collective."""
    loaded = None
    for turn in range(mesh.size()):
        if turn == mesh.get_local_rank():
            loaded = load()
        dist.barrier(mesh.get_group())
    return loaded


def _empty(path: str, head: bool, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model on the meta device. Raises CheckpointError when its config describes none."""
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    auto: Any = AutoModelForCausalLM if head else AutoModel
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"cannot load a model from {path}: {one_line(error)}") from error


def _reads_rows(model: PreTrainedModel, world: int) -> bool:
    """Return whether a shard of each weight, which is a block of its rows, comes from rows of the files alone.

    It does where weights are only renamed, and where a mixture's experts are joined into one tensor: a rank then reads
    its experts whole, if each rank has as many.
    """
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    even = all(p.shape[0] % world == 0 for p in model.parameters() if p.ndim > 2)
    return not converters or (even and all(_joins_experts(c) for c in converters))


def _joins_experts(converter: WeightConverter) -> bool:
    first, *rest = converter.operations
    joins = isinstance(first, MergeModulelist) and first.dim == 0
    return joins and all(isinstance(op, Concatenate) and op.dim > 0 for op in rest)


def _move_buffers(module: nn.Module, mesh: DeviceMesh) -> None:
    """Move buffers to the mesh's devices. FSDP moves none that was on the meta device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(mesh.device_type)
