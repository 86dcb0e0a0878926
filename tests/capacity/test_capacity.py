"""Whether a run fits: the arithmetic, what is refused and in which words, and the bytes that training really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from dvpo_service.capacity.memory import devices, micro_tokens
from dvpo_service.capacity.plan import Capacity
from dvpo_service.capacity.shape import ModelShape, model_shape, shape_of
from dvpo_service.config import Config, load_config
from dvpo_service.errors import CheckpointError, ConfigError
from dvpo_service.models.small import character_tokenizer
from tests.builders import make_config

QWEN_7B = hf.Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
SHIPPED = "qwen2.5-7b-fsdp"


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return shape_of(QWEN_7B)


def capacity(shape: ModelShape, gib: float, *overrides: str) -> Capacity:
    return Capacity(load_config(SHIPPED, list(overrides)), shape, gib)


def test_sizes_come_from_the_config_alone(qwen: ModelShape) -> None:
    assert qwen.parameters == 7_615_616_512, "as the model's card says"
    assert qwen.parameters - qwen.body == 152064 * 3584, "a critic has no output layer"
    assert (qwen.layers, qwen.hidden, qwen.kv) == (28, 3584, 2 * 28 * 4 * 128)
    # 237 KB a token and layer were measured with bfloat16 at this width.
    assert 2 * qwen.saved == pytest.approx(237e3, rel=0.15)


def test_the_shipped_7b_fits_eighty_gib(qwen: ModelShape) -> None:
    plan = capacity(qwen, 80)
    plan.check()
    policy = next(d for d in plan.devices if d.pool == "policy")
    sizes = {part.name: part.size for part in policy.parts}
    assert sizes["weights (float32)"] == 4 * qwen.parameters / 4
    assert sizes["gradients (float32)"] == 4 * qwen.parameters / 4


@pytest.mark.parametrize(
    ("override", "pool", "part", "key"),
    [
        ("policy.gradient_checkpointing=false", "policy", "activations", "policy.gradient_checkpointing=true"),
        ("policy.defer_gradient_reduction=true", "policy", "gradients", "policy.defer_gradient_reduction=false"),
        ("critic.world_size=1", "critic", "optimizer", "critic.world_size"),
    ],
)
def test_what_cannot_fit_is_named_with_the_key_to_change(
    override: str, pool: str, part: str, key: str, qwen: ModelShape
) -> None:
    with pytest.raises(ConfigError, match=rf"each {pool} actor needs .* The most is for {part}.*{key}"):
        capacity(qwen, 64, override).check()


def test_the_longest_response_is_the_last_that_fits(qwen: ModelShape) -> None:
    plan = capacity(qwen, 80, "policy.max_tokens_per_micro_batch=null", "critic.max_tokens_per_micro_batch=null")
    longest = plan.longest_response()
    assert longest > 100
    assert plan.fits(longest)
    assert not plan.fits(longest + 1)


def test_one_process_has_no_engine_and_no_weights_on_their_way(tiny_model: Path, qwen: ModelShape) -> None:
    apart, one = (
        Capacity(make_config(tiny_model, cluster={"in_process": together}), qwen, 8.0) for together in (False, True)
    )
    assert [d.pool for d in apart.devices] == ["policy", "critic", "rollout"]
    assert [d.pool for d in one.devices] == ["policy", "critic"]
    assert one.host["processes"] * 4 == apart.host["processes"], "two trainers, an actor and its EngineCore"
    assert "weights to engines" in apart.host.keys() - one.host.keys()


def test_a_token_budget_bounds_a_micro_batch() -> None:
    config = make_config("model", policy={"micro_batch_size": 8, "mini_batch_size": 8}, data={"max_prompt_tokens": 24})
    assert micro_tokens(config.policy, config) == 8 * 32
    pool = config.policy.model_copy(update={"max_tokens_per_micro_batch": 100})
    assert micro_tokens(pool, config) == 100


def test_a_model_whose_config_is_not_there_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        model_shape(make_config("/nowhere/model"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its weights and activations are most of what a process grows by."""
    folder = tmp_path_factory.mktemp("model")
    config = hf.LlamaConfig(
        vocab_size=300,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pool", ["critic"])  # half a minute each; the policy's, with checkpointing, passed too
def test_the_formulas_hold_in_a_real_process(pool: str, model: Path) -> None:
    sizes: dict[str, Any] = {"micro_batch_size": 4}
    config: Config = make_config(
        model,
        policy=sizes,
        critic=sizes,
        data={"max_prompt_tokens": 28},
        rollout={"prompts_per_step": 2, "n": 4, "max_new_tokens": 228},
        algorithm={"n_quantiles": 20, "n_heads": 2, "critic_hidden_dim": 64},
    )
    command = [sys.executable, "-m", "tests.capacity.measured", pool, config.model_dump_json()]
    # Freed memory goes back to the system at once; otherwise glibc keeps what the loading of the model has freed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout.strip().splitlines()[-1])["grown"]
    planned = next(d for d in devices(config, model_shape(config)) if d.pool == pool).size
    assert planned == pytest.approx(grown, rel=0.15)
