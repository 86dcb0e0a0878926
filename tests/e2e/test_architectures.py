"""Real architectures through a run's stages: engine and trainer agree as loaded, and after each update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.architectures import CONFIGS

# Each engine start costs twenty seconds. These three have nothing that the others do not; they run by hand:
# ``python -m tests.e2e.architectures OUT llama qwen2 qwen3``.
BY_HAND = {"llama", "qwen2", "qwen3"}
NAMES = [name for name in CONFIGS if name not in BY_HAND]

pytestmark = pytest.mark.e2e

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What became of each model; two processes share the work."""
    folder = tmp_path_factory.mktemp("models")
    command = [sys.executable, "-m", "tests.e2e.architectures", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    halves = [
        subprocess.Popen([*command, *NAMES[i::2]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        for i in range(2)
    ]
    lines = [line for half in halves for line in half.communicate(timeout=900)[0].decode().splitlines()]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    return {result["name"]: result for result in found}


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_computes_what_the_trainer_does(results: Results, name: str) -> None:
    result = results[name]
    assert "error" not in result, result["error"]
    assert len(result["kl"]) == 3, "as loaded, after one update, after two"
    assert max(result["kl"]) < 1e-6, result["kl"]
    assert result["moved"] > 1e-4, "the updates change the policy, so weights that did not arrive would show"
