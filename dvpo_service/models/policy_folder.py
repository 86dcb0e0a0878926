"""The weights of a policy in a Hugging Face folder, with its adapter by itself where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dvpo_service.config.pools import LoraConfig
from dvpo_service.models.lora import merged, plain, write_adapter
from dvpo_service.models.weight_files import write_weights
from dvpo_service.models.whole import as_in_files, gathered, saved, shapes

ADAPTER = "adapter"  # the folder that peft loads


def write_policy(lm: Any, folder: Path | None, *, lora: LoraConfig | None, base: str) -> None:
    """Write configuration and weights of a causal LM, a weight at a time. Collective where it is sharded.

    Args:
      folder: None for a rank that does not write.
      lora: the adapter's settings; the weights are then the merged ones, and the adapter is written beside them.
      base: name or path of the model that the adapter is for.
    """
    weights = saved(lm)
    if folder is not None:
        lm.save_pretrained(folder, state_dict={})  # all but the weights
    write_weights(as_in_files(lm, shapes(plain(weights))), as_in_files(lm, gathered(merged(lm, weights))), folder)
    if lora:
        write_adapter(weights, lora, base, folder / ADAPTER if folder else None)
