"""FSDP2 sharding, as warm start, policy and critic all use it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dvpo_service.models.load import text_model


def all_ranks(device: torch.device) -> DeviceMesh:
    """Return the mesh of all ranks, each with a device of the kind of ``device``. Collective."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard(module: Any, mesh: DeviceMesh, *, bfloat16: bool, checkpointing: bool = False) -> Any:
    """Shard ``module`` in place over the ranks of ``mesh``, and return it. No rank waits for another.

    Each decoder layer is one FSDP unit, a critic's heads are one, and the rest is one. Parameters keep their precision,
    which is float32 where the optimizer updates them; they move to the mesh's devices, except those on the meta device.

    Args:
      bfloat16: compute in bfloat16, and reduce gradients in float32; otherwise everything is float32.
      checkpointing: recompute activations in the backward pass instead of storing them.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    backbone = getattr(module, "backbone", module)
    if checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers checkpoints in training mode only, and from_pretrained returns a model in eval mode.
        turn_off_noise(backbone)
        backbone.train()
    if mesh.size() == 1 and not bfloat16:
        return module.to(mesh.device_type)  # nothing to share: FSDP's hooks would only cost time
    for layer in decoder_layers(text_model(backbone)):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if hasattr(module, "value"):  # the critic's heads compute in float32
        fully_shard(module.value, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def turn_off_noise(backbone: Any) -> None:
    """Turn off what a model does in training mode only, so that it computes what it does in eval mode.

    That is dropout, skipped layers (OPT's ``layerdrop``) and noise on a router's input (Mixtral's ``jitter_noise``).
    Modules hold the probability as ``nn.Dropout.p``, as a number of their own, or read it from the config at each call.
    The model's own config stays as it is, because exports write it.
    """
    quiet = copy.deepcopy(backbone.config)
    _zero_noise(vars(quiet))
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if module is not backbone and getattr(module, "config", None) is backbone.config:
            module.config = quiet
        _zero_noise(vars(module))


def _zero_noise(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            values[name] = 0.0


def decoder_layers(backbone: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a Hugging Face decoder: its longest ModuleList that is in no other.

    A list inside another is a part of a block, such as the experts of a layer.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    if lists:
        yield from max(lists.values(), key=len)
