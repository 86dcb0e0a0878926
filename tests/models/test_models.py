"""Policy and critic on a padded batch return what plain transformers returns on each sequence alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dvpo_service.algo.policy_loss import token_logprobs
from dvpo_service.errors import CheckpointError
from dvpo_service.models.base import save_base
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads
from dvpo_service.models.load import check_model, load_backbone, load_causal_lm
from dvpo_service.models.policy import PolicyModel
from dvpo_service.types import Rollouts
from tests.builders import make_rollouts

HEADS, QUANTILES = 3, 5


def make_critic(folder: Path, seed: int = 0) -> DistributionalCritic:
    return DistributionalCritic(
        load_backbone(str(folder)), width=16, num_heads=HEADS, num_quantiles=QUANTILES, seed=seed
    )


def sequence(rollouts: Rollouts, row: int) -> tuple[Tensor, int, int]:
    """Return one row's tokens without padding, the length of its prompt and the length of its response."""
    prompt, response = int(rollouts.prompt_lens[row]), int(rollouts.response_lens[row])
    return rollouts.tokens[row, : prompt + response], prompt, response


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_scores_a_padded_batch_like_each_sequence_alone(tiny_model: Path, temperature: float) -> None:
    lm = load_causal_lm(str(tiny_model))
    rollouts = make_rollouts()
    with torch.no_grad():
        logprobs, entropy = PolicyModel(lm, temperature=temperature)(
            rollouts.tokens,
            rollouts.prompt_lens,
            rollouts.prompt_lens + rollouts.response_lens,
            rollouts.response_mask.shape[1],
        )
        for row in range(len(rollouts)):
            tokens, prompt, response = sequence(rollouts, row)
            logits = lm(input_ids=tokens[None]).logits[:, prompt - 1 : -1] / temperature  # type: ignore[operator]
            alone = token_logprobs(logits, tokens[None, prompt:])[0]
            torch.testing.assert_close(logprobs[row, :response], alone, atol=1e-5, rtol=1e-5)
            wanted = torch.distributions.Categorical(logits=logits[0]).entropy()
            torch.testing.assert_close(entropy[row, :response], wanted, atol=1e-5, rtol=1e-5)


def test_critic_reads_the_state_before_each_token_and_after_the_last(tiny_model: Path) -> None:
    critic, rollouts = make_critic(tiny_model), make_rollouts()
    t = rollouts.response_mask.shape[1]
    positions = response_positions(rollouts.prompt_lens, t + 1, rollouts.tokens.shape[1])
    with torch.no_grad():
        z = split_heads(critic(rollouts.tokens, rollouts.prompt_lens + rollouts.response_lens, positions), HEADS)
        assert z.shape == (len(rollouts), t + 1, HEADS, QUANTILES)
        for row in range(len(rollouts)):
            tokens, prompt, response = sequence(rollouts, row)
            hidden = critic.backbone(input_ids=tokens[None]).last_hidden_state[0]  # type: ignore[operator]
            alone = split_heads(critic.value(hidden[prompt - 1 :]), HEADS)
            torch.testing.assert_close(z[row, : response + 1], alone, atol=1e-5, rtol=1e-5)


def test_heads_start_apart_and_the_seed_decides_how(tiny_model: Path) -> None:
    one, same, other = (make_critic(tiny_model, seed).value.heads.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    a, b, c = one.unflatten(0, (HEADS, QUANTILES))
    assert not torch.equal(a, b)
    assert not torch.equal(b, c)


def test_making_a_critic_leaves_the_random_state_alone(tiny_model: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make_critic(tiny_model, seed=9)
    load = torch.get_rng_state()
    assert torch.equal(before, load)


def test_the_character_tokenizer_round_trips_any_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for text in ("12+7=", "a b\n\tc", "naïve € 数", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("12+7=")["input_ids"]) == 5
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], tokenize=False
    )
    assert chat == "<user>1<assistant>2<eos>"


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.path \./nowhere: no such folder"):
        check_model("./nowhere", 10)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights; expected"):
        check_model(str(tmp_path), 10)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot load a model from"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 128),
    ],
)
def test_a_model_reads_as_much_as_its_rope_scaling_says(
    rope: dict[str, Any], limit: int, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "config.json"
    rope |= {"rope_theta": 1e4} | ({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if "llama3" in str(rope) else {})
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))
    check_model(str(model), limit)
    with pytest.raises(CheckpointError, match=rf"reads {limit} tokens, but .* = {limit + 1}; lower one of them"):
        check_model(str(model), limit + 1)


@pytest.mark.parametrize("given", [{"do_sample": False, "temperature": 0.6}, {"top_p": 0.9}, {"do_sample": True}])
def test_a_generation_config_that_contradicts_itself_is_saved_all_the_same(
    tiny_model: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    save_base(str(model), tmp_path / "run")
    load_causal_lm(str(model)).save_pretrained(tmp_path / "export")
    for folder in (tmp_path / "run" / "base", tmp_path / "export"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert saved["do_sample"] is True
        assert {key: saved[key] for key in given} == given | ({"do_sample": True} if "do_sample" in given else {})
