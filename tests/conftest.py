"""Shared fixtures: a tiny model folder, a tiny config, a batch of rollouts."""

from __future__ import annotations

import os

# Before torch is imported anywhere: the machine's cores are shared by everything a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

from dvpo_service.config import Config
from dvpo_service.models.small import save_small_model
from tests.builders import make_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked ``gpu(n)`` needs n CUDA devices; nothing else is ever skipped."""
    import torch

    devices = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker and devices < marker.args[0]:
            item.add_marker(pytest.mark.skip(reason=f"needs CUDA devices: {marker.args[0]}"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained two-layer model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_small_model(folder, hidden_size=64, num_layers=2, num_heads=2, max_positions=128, seed=0)
    return folder


@pytest.fixture
def config(tiny_model: Path) -> Config:
    return make_config(tiny_model)
