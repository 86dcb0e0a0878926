"""Loading of a checkpoint's sharded safetensors into a whole module, in one process without a process group."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dvpo_service.errors import CheckpointError, one_line

MODEL = "model."  # the prefix that the trainer gives the names of parameters


def unshard(folder: Path, module: nn.Module, prefix: str = "") -> None:
    """Load the weights that ``Trainer.save`` wrote to ``folder``, at any world size, into ``module``.

    Weights that are frozen in ``module`` are in no checkpoint, and stay as they are.

    Args:
      prefix: the path of ``module`` within the trained module, e.g. ``backbone.``.

    Raises:
      CheckpointError: when files are missing or damaged, or hold another architecture.
    """
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    wanted = {f"{MODEL}{prefix}{name}": t for name, t in module.state_dict().items() if name not in frozen}
    try:
        reader = HuggingFaceStorageReader(str(folder))
        metadata = reader.read_metadata()
        _check_whole(metadata, wanted)
        wanted = _untied(wanted, metadata)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose
            dcp.load(wanted, storage_reader=reader, no_dist=True)  # copies into the module's own tensors
    except (OSError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"checkpoint {folder}: {_reason(error)}; export another checkpoint of the run") from error


def _untied(wanted: dict[str, Tensor], metadata: Metadata) -> dict[str, Tensor]:
    """Return ``wanted`` without tensors saved under another name, such as an output layer tied to the embedding."""
    saved = {name: t for name, t in wanted.items() if name in metadata.state_dict_metadata}
    storages = {t.data_ptr() for t in saved.values()}
    return saved | {name: t for name, t in wanted.items() if t.data_ptr() not in storages}


def _check_whole(metadata: Metadata, wanted: dict[str, Tensor]) -> None:
    """Raise ValueError unless the shards make up every tensor. torch itself does not report a missing file."""
    for name in wanted:
        saved = metadata.state_dict_metadata.get(name)
        if isinstance(saved, TensorStorageMetadata):
            held = sum(chunk.sizes.numel() for chunk in saved.chunks)
            if held != saved.size.numel():
                raise ValueError(
                    f"{saved.size.numel() - held} numbers of {name} are missing: a shard file is not there"
                )


def _reason(error: BaseException) -> str:
    """Return what went wrong on the only rank, without the library's stack traces."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return one_line(error)
