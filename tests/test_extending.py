"""The examples of docs/extending.md, as they stand there: loaded, checked, and a real run with many of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dvpo_service.commands.check_plugins import check_plugins
from dvpo_service.config import load_config
from dvpo_service.rewards.scoring import resolve

GUIDE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
FILES = {
    name: code
    for code in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    for name in re.findall(r"# (my_\w+\.py)", code.splitlines()[0])
}
COMMANDS = [" ".join(c.replace("\\\n", " ").split()) for c in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the examples in it."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    rows = [{"instruction": "Add.", "input": f"{i}+1=", "output": str(i + 1)} for i in range(20)]
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def overrides(command: str) -> list[str]:
    import shlex

    return [w for w in shlex.split(command) if "=" in w]


def test_the_guide_has_an_example_of_every_part() -> None:
    assert set(FILES) == {f"my_{n}.py" for n in ("advantage", "win_rate", "loss", "terms", "reward", "rows", "engine")}
    for name in FILES:
        assert any(f"{name.removesuffix('.py')}:" in command for command in COMMANDS), name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split()[-1][:40])
def test_every_command_of_the_guide_passes_the_checks(beside: Path, command: str) -> None:
    config = load_config("demo", overrides(command))
    check_plugins(config)
    resolve(config.reward.function)


def test_the_reward_of_the_guide_scores(beside: Path) -> None:
    score = resolve("my_reward:close_enough")
    assert [score(r, "4") for r in ("4", "5", "four")] == [1.0, 0.5, 0.0]


@pytest.mark.e2e
def test_a_run_with_parts_of_ones_own_learns_from_them(beside: Path, tiny_model: Path) -> None:
    """All that fit together, on a real critic, policy and cluster, with an engine that is not vLLM."""
    (beside / "mine.yaml").write_text(
        f"model: {{path: {tiny_model}}}\n"
        "data: {row_format: 'my_rows:from_instructions', train_files: instructions.jsonl, val_fraction: 0.2}\n"
        "rollout: {engine: 'my_engine:TransformersEngine', prompts_per_step: 4, n: 4, max_new_tokens: 4}\n"
        "reward: {function: 'my_reward:close_enough'}\n"
        "algorithm: {adv_estimator: 'my_win_rate:WinRate', n_quantiles: 8, critic_terms: {'my_terms:narrow': 0.1}}\n"
        "critic: {mini_batch_size: 16}\n"
        "policy: {mini_batch_size: 16, loss: 'my_loss:reinforce'}\n"
        "trainer: {num_steps: 2, eval_every: 0, eval_samples: 1, save_every: 0}\n"
    )
    command = [sys.executable, "-m", "dvpo_service", "train", "--config", "mine.yaml", "--run-dir", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(line) for line in (beside / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1, 2]
    for row in metrics[1:]:
        assert row["policy/rollout_kl"] < 1e-9, "the engine samples from the policy that is trained"
        assert math.isfinite(row["critic/loss/narrow"])
        assert row["critic/weighted/narrow"] == pytest.approx(0.1 * row["critic/loss/narrow"])
        assert row["policy/grad_norm"] > 0
    config = (beside / "run/config.yaml").read_text()
    for name in ("my_win_rate:WinRate", "my_loss:reinforce", "my_terms:narrow", "my_engine:TransformersEngine"):
        assert name in config
    assert "my_win_rate:WinRate" in (beside / "run/policy/README.md").read_text()
