"""The examples of docs/rewards.md, as they stand there: loaded, validated and scored."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo_service.config import Config, load_config
from dvpo_service.data.dataset import load_prompts
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.parts import load_part
from dvpo_service.rewards.scoring import Result, resolve
from tests.rewards.small_models import save_reward_model

GUIDE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
FILES = {
    re.findall(r"# (my_\w+\.py)", code.splitlines()[0])[0]: code
    for code in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
}
SECTIONS = re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def loaded(beside: Path, section: str) -> Config:
    (beside / "mine.yaml").write_text("extends: demo\n" + section)
    return load_config(str(beside / "mine.yaml"))


def results(function: str, responses: list[str], answer: Any, **row: Any) -> list[Result]:
    chat = ({"role": "user", "content": "2+3="},)
    return resolve(function).results(Work(responses, answer, [0] * len(responses), "sums", row, chat))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.splitlines()[0][:40])
def test_every_section_of_the_guide_is_a_config_whose_rewards_load(
    beside: Path, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_reward_model(beside / "models" / "my-reward-model", "decoder")
    monkeypatch.chdir(beside)
    config = loaded(beside, section)
    assert set(yaml.safe_load(section)) <= {"reward", "data", "rollout"}
    for part in config.reward.parts:
        load_part(config.reward, part)


def test_the_rows_of_tests_in_the_guide_are_what_the_code_reward_takes(tmp_path: Path) -> None:
    rows = re.findall(r"```json\n(.*?)```", GUIDE, flags=re.DOTALL)
    programs = ["print(sum(map(int, input().split())))", "def add(a, b): return a + b"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    prompts = load_prompts([tmp_path / "rows.jsonl"], name="t").prompts
    assert len(prompts) == len(programs)
    for prompt, program in zip(prompts, programs, strict=True):
        [result] = results("code", [f"```python\n{program}\n```"], prompt.answer)
        assert result.value == 1.0


def test_functions_of_the_guide_score(beside: Path) -> None:
    assert [r.value for r in results("my_close:score", ["4", "5", "four"], "4")] == [1.0, 0.5, 0.0]
    [right, wrong] = results("my_unit:score", ["5 apples", "5 pears"], "5", unit="apples")
    assert right == Result(1.0, {"right_number": 1.0, "words": 2.0})
    assert (wrong.value, wrong.metrics["right_number"]) == (0.0, 1.0)
    assert [r.value for r in results("my_batch:unlike_the_others", ["5", "5", "6"], "5")] == [0.5, 0.5, 0.0]
