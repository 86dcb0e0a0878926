"""How the error of a failed call is classified."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter

from actors.cluster.pool import storage_error


def test_what_the_disk_refused_is_found_in_torch_s_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is pickled, as it is when it comes from a rank."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"a": torch.zeros(3)}, storage_writer=HuggingFaceStorageWriter(str(tmp_path)), no_dist=True)
    error = storage_error(pickle.loads(pickle.dumps(caught.value)))  # noqa: S301
    assert error is not None
    assert error.errno == errno.ENOSPC


def test_a_mistake_in_the_code_is_none_of_the_disk_s() -> None:
    assert storage_error(ValueError("x")) is None
    assert storage_error(CheckpointException("save", {})) is None
