"""A rank's part of a checkpoint: taken at once, written while training goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from dvpo_service.runs.integrity import NOTHING, Files
from dvpo_service.runs.storage import is_url


class BackgroundSaver:
    """Saves of one rank, one at a time: ``start`` copies the tensors to the CPU, a thread writes the copy.

    Not ``dcp.async_save``: it plans in its thread, so it talks to the other ranks there, beside the
    training's own collectives, which takes a second process group. Here the ranks plan together in
    ``start``, which is cheap, and the writing needs nobody.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[Files] | None = None

    def start(self, tensors: dict[str, Tensor], folder: str) -> None:
        """Returns when ``tensors`` may change. Collective. An earlier save is waited for: one copy at a time."""
        if self._writing is not None:
            self._writing.exception()  # whoever asked for that save has asked for its outcome, or has dropped it
        writer = _StagingWriter(folder)
        try:
            dcp.save(tensors, storage_writer=writer)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        self._writing = self._thread.submit(writer.write)

    def outcome(self, *, wait: bool) -> Files | None:
        """The files that this rank wrote; None while it writes and ``wait`` is not given. Raises what it met."""
        assert self._writing is not None, "a save was started"
        return self._writing.result() if wait or self._writing.done() else None


class _StagingWriter(HuggingFaceStorageWriter):
    """Sharded safetensors, below a path or an fsspec URL. To ``dcp.save`` it pretends to have written."""

    def __init__(self, folder: str):
        super().__init__(folder, save_distributed=True)
        files: Any = _RemoteFiles() if is_url(folder) else _LocalFiles()
        self.fs = self.files = files
        self.path, self.sync_files = self.files.init_path(folder), not is_url(folder)
        self.plan = SavePlan([])
        self.copies: Any = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[Any]:
        self.plan, self.copies = plan, _Copies(plan, planner)
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result([])
        return done

    def write(self) -> Files:
        super().write_data(self.plan, self.copies).wait()
        self.copies = None
        return self.files.sums


class _Copies:
    """What a planner says of this rank's tensors, as they were, on the CPU."""

    def __init__(self, plan: SavePlan, planner: SavePlanner):
        self.tensors: dict[MetadataIndex, Tensor] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), "only tensors are saved"
            self.tensors[item.index] = tensor.detach().to("cpu", copy=True)

    def resolve_data(self, item: WriteItem) -> Tensor:
        return self.tensors[item.index]


class _Summing:
    """A file system that sums up what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Files = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:  # type: ignore[misc]
            summed = _SummedStream(stream)
            yield summed
        self.sums[os.path.basename(path)] = summed.sum


class _LocalFiles(_Summing, FileSystem):
    pass


class _RemoteFiles(_Summing, FsspecFileSystem):
    pass


class _SummedStream:
    def __init__(self, stream: Any):
        self._stream, self.sum = stream, NOTHING

    def write(self, data: bytes) -> int:
        self.sum = self.sum.add(data)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
