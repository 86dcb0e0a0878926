"""An engine without a model, for the tests of the pool: real Ray actors, faults on demand."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np

from actors.cluster.pool import EngineLost
from dvpo_service.config import Backend, Config
from dvpo_service.roles import Engine
from dvpo_service.types import Prompt, Sample, Sampling


class FakeEngine(Engine):
    """Its samples say which seed and weights made them. ``model_path`` is a folder whose files ask for faults.

    ``die``, ``hang``, ``lost``, ``silent`` and ``torn`` happen once: the first engine that comes across such a file
    removes it.
    ``refuse`` and ``nothing`` stay.
    """

    def __init__(self, config: Config, model_path: str, backend: Backend):
        self.folder = Path(model_path)
        self.weight_version = -1
        self.updates: list[Any] = []

    async def start(self) -> None:
        if self._once("no-start"):
            raise RuntimeError("there is no model here")

    async def generate(self, prompts: list[Prompt], sampling: Sampling, seeds: list[int]) -> list[list[Sample]]:
        if self._once("die"):
            os._exit(1)
        if self._once("hang"):
            await asyncio.sleep(3600)
        if self._once("lost"):
            raise EngineLost("its process is gone")
        if (self.folder / "refuse").exists():
            raise ValueError("the prompt is too long")
        if (self.folder / "nothing").exists():
            return None  # type: ignore[return-value]
        return [
            [
                Sample(p.index, i, (seed % 1000, i), (-1.0, -1.0), str(os.getpid()), "stop", self.weight_version)
                for i in range(sampling.n)
            ]
            for p, seed in zip(prompts, seeds, strict=True)
        ]

    async def heartbeat(self) -> None:
        if self._once("silent"):
            await asyncio.sleep(3600)

    async def update_weights(self, update_info: Any, content: np.ndarray | None = None) -> None:
        if self._once("torn"):
            raise RuntimeError("the update left 3 parameters unchanged")
        self.updates.append(update_info)

    def _once(self, fault: str) -> bool:
        try:
            (self.folder / fault).unlink()
        except FileNotFoundError:
            return False
        return True
