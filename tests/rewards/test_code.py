"""The code reward: programs in responses against tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dvpo_service.config import RewardConfig
from dvpo_service.config.code import CodeConfig
from dvpo_service.rewards import code
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.parts import load_part
from dvpo_service.rewards.sandbox import SandboxFailed

ADDS = "Sure:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```\nIt adds."
SUMS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
CALLS = {"fn_name": "add", "inputs": [[1, 2], [0.1, 0.2]], "outputs": [3, 0.3]}


def block(program: str) -> str:
    return f"```python\n{program}\n```"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (ADDS, "a, b = map(int, input().split())\nprint(a + b)"),
        ("```\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2"),
        ("<think>```python\nbad\n```</think>```python\ngood = 1", "good = 1"),
        ("print(1)", "print(1)"),
        ("  ", None),
    ],
)
def test_the_last_block_is_the_program(response: str, program: str | None) -> None:
    assert code.extract(response) == program


def test_standard_input_and_output() -> None:
    assert code.score(ADDS, SUMS) == {"score": 1.0, "tests_passed": 1.0, "stopped": 0.0, "raised": 0.0}
    assert code.score(ADDS, json.dumps(SUMS))["score"] == 1.0
    half = SUMS | {"outputs": ["3", "8"]}
    assert code.score(ADDS, half) == {"score": 0.0, "tests_passed": 0.5, "stopped": 0.0, "raised": 0.0}
    assert code.score(ADDS, half, CodeConfig(partial=True))["score"] == 0.5


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    print('noise')\n    return a + b",
        "class Solution:\n    def add(self, a, b):\n        return a + b",
    ],
)
def test_function_calls(program: str) -> None:
    assert code.score(block(program), CALLS)["score"] == 1.0


def test_arguments_and_values_as_text_of_json() -> None:
    tests = {"fn_name": "pair", "inputs": ['[1, 2]\n"x"'], "outputs": ['[[1, 2], "x"]']}
    assert code.score(block("def pair(a, b):\n    return a, b"), tests)["score"] == 1.0


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b): return a - b",
        "def add(a, b): return str(a + b)",
        "def add(a, b): return {1, 2}",
        "def add(a, b): return True",
        "def other(a, b): return a + b",
        "import os\ndef add(a, b): os._exit(0)",
        "print(3)\nimport sys\nsys.exit(0)",
        "def add(a, b) return",
    ],
)
def test_a_wrong_program_scores_0_and_is_no_failed_sample(program: str) -> None:
    assert code.score(block(program), CALLS)["score"] == 0.0


def test_a_program_that_is_stopped_scores_0() -> None:
    scored = code.score(block("while True: pass"), SUMS, CodeConfig(cpu_s=1))
    assert scored == {"score": 0.0, "tests_passed": 0.0, "stopped": 1.0, "raised": 0.0}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("4", "two lists of the same length"),
        ("four", "an object or its JSON text"),
        ({"inputs": ["1"], "outputs": []}, "two lists of the same length"),
        ({"inputs": [], "outputs": []}, "two lists of the same length"),
        ({"inputs": [1], "outputs": ["1"]}, "are texts"),
        ({"inputs": [1], "outputs": [1], "fn_name": "f"}, "is a list of arguments"),
    ],
)
def test_an_answer_without_tests_fails_the_sample(answer: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        code.score(ADDS, answer)


def test_the_config_s_limits_hold_and_a_broken_sandbox_fails_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RewardConfig.model_validate({"function": "code", "code": {"partial": True, "memory_mib": 300}})
    part = load_part(config, config.parts[0])
    half = SUMS | {"outputs": ["3", "8"]}
    [[result]] = part.score([Work([ADDS], half, [0])])
    assert (result.value, result.metrics["tests_passed"]) == (0.5, 0.5)

    def broken(*_: Any) -> Any:
        raise SandboxFailed("no room for a process")

    monkeypatch.setattr(code, "run_program", broken)
    [[result]] = part.score([Work([ADDS], half, [0])])
    assert result.error == "SandboxFailed: no room for a process"


def test_its_programs_end_before_the_pool_loses_patience() -> None:
    config = RewardConfig.model_validate({"function": "code", "code": {"program_s": 10, "wall_s": 5}})
    assert config.timeout_of(config.parts[0], 8) == 30 + 8 * 15
