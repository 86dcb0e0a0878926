"""A rank's part of a checkpoint: copied at once, written in a thread while training goes on."""

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
    """Writes the checkpoint parts of one rank, one at a time. ``start`` copies the tensors to the CPU; a thread writes.

    It does not use ``dcp.async_save``, which plans in its thread. It would talk to the other ranks there, at the same
    time as the training's own collectives, and would need a second process group for that. Here the ranks plan together
    in ``start``, which is cheap, and the writing needs no other rank.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[Files] | None = None

    def start(self, tensors: dict[str, Tensor], folder: str) -> None:
        """Start to write ``tensors``, and return when they may change. Collective.

        It waits for an earlier save to end, so that there is only one copy at a time.

        Args:
          tensors: by name; the same names on every rank.
          folder: a path or an fsspec URL.

        Raises:
          Exception: what the first rank that failed raised.
        """
        if self._writing is not None:
            self._writing.exception()  # only waits: its caller has seen its outcome, or dropped it
        writer = _StagingWriter(folder)
        try:
            dcp.save(tensors, storage_writer=writer)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        self._writing = self._thread.submit(writer.write)

    def outcome(self, *, wait: bool) -> Files | None:
        """Return the files that this rank wrote since ``start``, or None if it still writes and ``wait`` is False.

        Raises:
          OSError: the files could not be written.
        """
        assert self._writing is not None, "a save was started"
        return self._writing.result() if wait or self._writing.done() else None


class _StagingWriter(HuggingFaceStorageWriter):
    """Writes sharded safetensors below a path or an fsspec URL, in two phases.

    ``dcp.save`` calls ``write_data``, which only copies the tensors and reports success; ``write`` writes them.
    """

    def __init__(self, folder: str):
        super().__init__(folder, save_distributed=True)
        files: Any = _RemoteFiles() if is_url(folder) else _LocalFiles()
        self.fs = self.files = files
        self.path = self.files.init_path(folder)
        self.sync_files = not is_url(folder)
        self.plan = SavePlan([])
        self.copies: Any = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[Any]:
        self.plan = plan
        self.copies = _CpuCopies(plan, planner)
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result([])
        return done

    def write(self) -> Files:
        """Write the copied tensors, and return the files with their checksums."""
        super().write_data(self.plan, self.copies).wait()
        self.copies = None
        return self.files.sums


class _CpuCopies:
    """Copies of this rank's tensors on the CPU. It takes the planner's place when the writer asks for the data."""

    def __init__(self, plan: SavePlan, planner: SavePlanner):
        self.tensors: dict[MetadataIndex, Tensor] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), "only tensors are saved"
            self.tensors[item.index] = tensor.detach().to("cpu", copy=True)

    def resolve_data(self, item: WriteItem) -> Tensor:
        return self.tensors[item.index]


class _WithChecksums:
    """Mixin for a file system: records the checksum of every file that is written, in ``sums``."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Files = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:  # type: ignore[misc]
            checked = _ChecksumStream(stream)
            yield checked
        self.sums[os.path.basename(path)] = checked.sum


class _LocalFiles(_WithChecksums, FileSystem):
    pass


class _RemoteFiles(_WithChecksums, FsspecFileSystem):
    pass


class _ChecksumStream:
    """Passes everything to a stream, and updates a checksum with what is written."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.sum = NOTHING

    def write(self, data: bytes) -> int:
        self.sum = self.sum.add(data)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
