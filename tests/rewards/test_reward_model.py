"""Reward models: scores as plain transformers gives them, one response at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.cluster.placement import plan_bundles
from dvpo_service.commands.check_rollouts import check_reward
from dvpo_service.commands.identity import _reward
from dvpo_service.config import RewardConfig
from dvpo_service.config.exposure import warnings_of
from dvpo_service.config.reward_model import RewardModelConfig
from dvpo_service.errors import ConfigError
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.model import ModelPart
from dvpo_service.types import Message, Prompt
from tests.builders import make_config
from tests.rewards.small_models import save_reward_model

CHAT = (Message(role="user", content="2+3="),)
RESPONSES = ["5", "It is five, as far as I can see.", "", "6" * 30, "5"]
WORKS = [Work(RESPONSES, "5", [0] * 5, messages=CHAT), Work(["7"], "7", [0], messages=CHAT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models with random heads: a decoder with one label, an encoder with three."""
    root = tmp_path_factory.mktemp("reward-models")
    return {kind: save_reward_model(root / kind, kind) for kind in ("decoder", "encoder")}


def plain(folder: Path, response: str) -> torch.Tensor:
    """Return the logits that transformers gives for one response by itself."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    chat = [*CHAT, {"role": "assistant", "content": response}]
    with torch.no_grad():
        return model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits[0]


def scores(folder: Path, works: list[Work] = WORKS, **more: Any) -> list[float]:
    found = ModelPart(RewardModelConfig(path=str(folder), **more)).score(works)
    assert [len(group) for group in found] == [len(work.responses) for work in works]
    return [r.value for group in found for r in group]


@pytest.mark.parametrize(("kind", "label"), [("decoder", 0), ("encoder", 2)])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_scores_are_those_of_plain_transformers(
    folders: dict[str, Path], kind: str, label: int, batch_size: int
) -> None:
    expected = [float(plain(folders[kind], text)[label]) for text in [*RESPONSES, "7"]]
    assert max(expected) - min(expected) > 1e-2, "they differ"
    assert scores(folders[kind], label=label, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)


def test_probabilities_and_half_precision(folders: dict[str, Path]) -> None:
    logits = plain(folders["encoder"], "7")
    one = scores(folders["encoder"], WORKS[1:], label=1, probability=True)
    assert one == pytest.approx([float(logits.softmax(0)[1])], abs=1e-5)
    single = float(plain(folders["decoder"], "7")[0].sigmoid())
    assert scores(folders["decoder"], WORKS[1:], probability=True) == pytest.approx([single], abs=1e-5)
    assert scores(folders["decoder"], WORKS[1:], dtype="bfloat16") == pytest.approx(
        scores(folders["decoder"], WORKS[1:]), abs=0.1
    )


def test_its_own_template_and_a_chat_that_is_too_long(folders: dict[str, Path]) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bare = scores(folders["decoder"], WORKS[1:], chat_template=template)
    assert bare != pytest.approx(scores(folders["decoder"], WORKS[1:]), abs=1e-4)
    [[short, long]] = ModelPart(RewardModelConfig(path=str(folders["decoder"]), max_tokens=20)).score(
        [Work(["5", "6" * 30], "5", [0, 0], messages=CHAT)]
    )
    assert short.error is None
    assert long.error == "prompt and response have 37 tokens, the reward model reads 20"
    [[failed]] = ModelPart(RewardModelConfig(path=str(folders["decoder"]), chat_template="{{ 1 / 0 }}")).score(
        WORKS[1:]
    )
    assert "ZeroDivisionError" in str(failed.error)


def test_a_model_of_no_use_is_one_line_before_the_run(
    folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    row = Prompt(0, CHAT, "5", "t")

    def said(path: Path, **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            check_reward(RewardConfig.model_validate({"model": {"path": str(path)} | more}), 0, row)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "it is a Qwen2ForCausalLM, not a model for sequence classification" in said(tiny_model)
    assert "no model of transformers" in said(tmp_path)
    assert "reward.model.label = 3, and it has 3, from 0 on" in said(folders["encoder"], label=3)
    without = save_reward_model(tmp_path / "silent", "decoder", template=False)
    assert "its tokenizer has no chat template" in said(without)
    check_reward(RewardConfig.model_validate({"model": {"path": str(folders["decoder"])}}), 0, row)


def test_a_folder_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "headless", "decoder", head=False)
    with pytest.raises(ConfigError, match=r"it has no weights for score\.weight, so it is no trained reward model"):
        ModelPart(RewardModelConfig(path=str(folder)))


def test_its_workers_are_planned_and_what_it_holds_is_what_the_run_is(folders: dict[str, Path], tmp_path: Path) -> None:
    model = {"path": str(folders["decoder"]), "num_workers": 2, "cpus": 3, "gpus": 0.5}
    alone = make_config("m", reward={"model": model})
    both = make_config("m", reward={"rewards": [{"function": "gsm8k"}, {"model": model}], "num_workers": 3})
    for config, plain_workers in ((alone, 0), (both, 3)):
        bundles = [b for b in plan_bundles(config) if b.pool.startswith("reward")]
        assert [b.pool for b in bundles] == ["reward"] * plain_workers + ["reward_model"] * 2
        assert bundles[-1].resources == {"CPU": 3.0, "GPU": 0.5}
    before = _reward(alone.reward)
    moved = tmp_path / "moved"
    moved.symlink_to(folders["decoder"])
    assert _reward(make_config("m", reward={"model": model | {"path": str(moved)}}).reward) == before
    assert _reward(make_config("m", reward={"model": model | {"path": str(folders["encoder"])}}).reward) != before
    trusting = make_config("m", reward={"model": model | {"trust_remote_code": True}})
    assert "reward.model.trust_remote_code=true" in warnings_of(trusting)[0]
