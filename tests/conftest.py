"""Shared fixtures: a tiny model folder, a tiny config, a batch of rollouts."""

from __future__ import annotations

import os

# Set before torch is imported: everything that a test starts shares the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from dvpo_service.config import Config
from dvpo_service.models.small import save_small_model
from tests.builders import make_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu(n)`` on a machine with fewer than n CUDA devices."""
    import torch

    devices = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker and devices < marker.args[0]:
            item.add_marker(pytest.mark.skip(reason=f"needs CUDA devices: {marker.args[0]}"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained two-layer model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_small_model(folder, hidden_size=64, num_layers=2, num_heads=2, max_positions=128, seed=0)
    return folder


@pytest.fixture
def config(tiny_model: Path) -> Config:
    """A small config with the tiny model."""
    return make_config(tiny_model)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server on loopback that this process runs."""
    from moto.server import ThreadedMotoServer  # takes seconds, and few tests need it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ``s3://`` URL of an empty bucket. Endpoint and keys are in the environment, as they are for a user."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"b{uuid.uuid4().hex[:12]}"
    UPath(f"s3://{name}").fs.mkdir(name)
    return f"s3://{name}"
