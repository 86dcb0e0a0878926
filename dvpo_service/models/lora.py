"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: they are trained, and the weights of the model stay as they are.

A linear layer with an adapter computes ``W x + alpha / rank * B A x``. Only A and B are trained. Engines, exports and
value servers get the weights ``W + alpha / rank * B A`` under the names that the model has without adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dvpo_service.config.pools import LoraConfig
from dvpo_service.errors import ConfigError, one_line
from dvpo_service.models.whole import Named, gathered

NAME = "default"  # peft's name of the one adapter
_BASE, _ADAPTER = ".base_layer.", ".lora_"
_PEFT_PREFIX = "base_model.model."  # of the names in peft's files


def add_adapter(model: Any, lora: LoraConfig, *, seed: int) -> Any:
    """Add an adapter to a transformers model in place, freeze all other weights, and return the model.

    At first the adapter changes nothing: B is 0. A is drawn from ``seed``, the same on every rank.

    Raises:
      ConfigError: the model has no layer that ``lora.target_modules`` names.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(_peft_config(lora, _targets(model, lora)), model, NAME)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules={lora.target_modules!r}: {one_line(error)}") from error
    if model.get_output_embeddings() in _adapted(model).values():  # it may be tied to the embedding, which has none
        raise ConfigError(
            f"lora.target_modules={lora.target_modules!r}: the output layer gets no adapter; leave it out"
        )
    strange = [name for name, layer in _adapted(model).items() if not isinstance(layer.get_base_layer(), nn.Linear)]
    if strange:  # peft parametrizes experts and routers in their forward pass, which FSDP does not see
        raise ConfigError(f"lora.target_modules={lora.target_modules!r}: {strange[0]} is no linear layer; leave it out")
    return model


def _targets(model: Any, lora: LoraConfig) -> list[str]:
    """Return the names of the layers that get an adapter. peft's own ``all-linear`` takes a mixture's experts too."""
    if lora.target_modules != "all-linear":
        return lora.target_modules
    output = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]


def _peft_config(lora: LoraConfig, targets: list[str]) -> Any:
    import peft

    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Have the model compute what it did before ``add_adapter``: the reference policy, without a copy of it."""
    layers = list(_adapted(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def plain(tensors: Iterable[Named]) -> list[Named]:
    """Return the tensors that a model has without its adapters, under the names that they have there."""
    return [(name.replace(_BASE, "."), x) for name, x in tensors if _ADAPTER not in name]


def merged(model: nn.Module, tensors: Iterable[Named]) -> Iterator[Named]:
    """Yield what ``plain`` returns, with the adapters' products added: the weights of an equal model without adapters.

    One weight is computed at a time, in its precision, and sharded as the model is. Collective where it is sharded.
    """
    layers = _adapted(model)
    for name, x in tensors:
        if _ADAPTER in name:
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight")) if name.endswith(".base_layer.weight") else None
        yield name.replace(_BASE, "."), x if layer is None else _sum(layer, x)


def write_adapter(tensors: Iterable[Named], lora: LoraConfig, base: str, folder: Path | None) -> None:
    """Write the adapter as peft's ``PeftModel.from_pretrained`` loads it. Collective where the tensors are sharded.

    Args:
      tensors: the model's, of which the adapter's are taken.
      base: name or path of the base model, for peft's record.
      folder: None for a rank that does not write.
    """
    adapter = gathered([(name, x) for name, x in tensors if _ADAPTER in name])
    own = {_PEFT_PREFIX + name.replace(f".{NAME}.", "."): x.detach().cpu() for name, x in adapter}
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    adapted = {name.removeprefix(_PEFT_PREFIX).partition(_ADAPTER)[0] for name in own}
    config = _peft_config(lora, sorted(adapted))
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    config.save_pretrained(str(folder))
    save_file({n: x.contiguous() for n, x in own.items()}, folder / "adapter_model.safetensors")


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and NAME in m.lora_A}


def _sum(layer: Any, weight: Tensor) -> Tensor:
    with torch.no_grad():
        product = layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight)
        return weight + (product.T if layer.fan_in_fan_out else product).to(weight.dtype)
