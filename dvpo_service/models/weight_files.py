"""Weights in safetensors files as Hugging Face writes them: one ``model.safetensors``, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvpo_service.models.whole import Named, shapes

MAX_FILE_BYTES = 5 * 10**9
TRANSFER_BYTES = 2**30  # of a file in memory through which engines on CPUs get a part of the weights
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def write_weights(empty: Iterable[Named], weights: Iterable[Named], folder: Path | None) -> None:
    """Write ``weights`` to ``folder``; no more than one file's are in memory.

    Args:
      empty: their names, shapes and precision, in the same order.
      weights: whole, on any device. Only taken from the iterator if ``folder`` is None, for a rank that does not write.
      folder: is there already.

    Raises:
      OSError, SafetensorError: the files cannot be written.
    """
    plan = dict(shapes(empty))
    split = split_torch_state_dict_into_shards(
        plan, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_FILE_BYTES
    )
    files = split.tensor_to_filename
    left = {name: len(names) for name, names in split.filename_to_tensors.items()}
    pending: dict[str, dict[str, Tensor]] = {name: {} for name in left}
    for name, tensor in weights:
        if folder is None:
            continue
        file = files[name]
        pending[file][name] = tensor.detach().cpu().contiguous()
        if len(pending[file]) == left[file]:
            save_file(pending.pop(file), folder / file, metadata={"format": "pt"})
    if folder is not None and split.is_sharded:
        total = {"total_parameters": sum(x.numel() for x in plan.values())}
        index = {"metadata": total | split.metadata, "weight_map": files}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights that ``write_weights`` wrote. Raises OSError or SafetensorError when they cannot be read."""
    return {name: x for file in _files(folder) for name, x in load_file(file).items()}


def _files(folder: Path) -> Iterator[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        yield folder / WEIGHTS_FILE
        return
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        yield folder / name
