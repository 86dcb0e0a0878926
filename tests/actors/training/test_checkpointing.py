"""Gradient checkpointing is on when it is asked for: bytes saved for the backward pass are measured, gradients kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from actors.cluster.pool import Rendezvous
from actors.training.critic import CriticWorker, row_seeds
from actors.training.policy import PolicyWorker
from dvpo_service.config import Config
from dvpo_service.host.network import free_port
from dvpo_service.models.load import load_tokenizer
from dvpo_service.models.sharding import turn_off_noise
from dvpo_service.models.whole import whole
from tests.builders import make_config, make_rollouts
from tests.processes import run_ranks


def backward_of(worker: Any, config: Config) -> tuple[int, Tensor]:
    """The bytes that one optimizer step saves for its backward pass, and its gradient; the step is not taken."""
    saved = [0]
    gradients: list[Tensor] = []

    def capture() -> None:
        grads = [whole(p.grad).flatten() for p in worker.trainer.module.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))

    def keep(x: Tensor) -> Tensor:
        saved[0] += x.numel() * x.element_size()
        return x

    worker.trainer.optimizer.step = capture
    rollouts = make_rollouts(seed=3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if isinstance(worker, CriticWorker):
            worker.evaluate(rollouts, {}, 0)
            worker.update()
        else:
            advantages = torch.ones(rollouts.rewards.shape)
            worker.update(rollouts, {"logprobs": rollouts.rollout_logprobs}, advantages, 0)
    return saved[0], gradients[0]


def _process(rank: int, kind: Any, configs: list[Config], model: str, out: str) -> None:
    torch.set_num_threads(1)
    measured = []
    for config in configs:
        worker = kind(config, model, Rendezvous(0, 1, "127.0.0.1", free_port(), 60))
        measured.append(backward_of(worker, config))
        torch.distributed.destroy_process_group()
    (plain, wanted), (checkpointed, gradient) = measured
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)
    Path(out).write_text(json.dumps([plain, checkpointed]))
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


def deep_model(folder: Path, tokenizer: Path) -> Path:
    """Six layers, so that a layer's inputs are little beside what is inside; with dropout, which must stay off."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(str(tokenizer)).save_pretrained(folder)
    return folder


def bytes_of(kind: Any, tokenizer: Path, folder: Path) -> tuple[int, int]:
    """Return the bytes that a step saves for its backward pass, without and with checkpointing."""
    model = deep_model(folder / f"deep-{kind.__name__}", tokenizer)
    pool = "policy" if kind is PolicyWorker else "critic"
    sections = [
        {pool: {"gradient_checkpointing": on, "mini_batch_size": 16, "micro_batch_size": 16, "epochs": 1}}
        for on in (False, True)
    ]
    configs = [make_config(model, algorithm={"n_quantiles": 8, "critic_hidden_dim": 16}, **s) for s in sections]
    out = folder / f"bytes-{kind.__name__}.json"
    run_ranks(_process, (kind, configs, str(model), str(out)), 1)
    plain, checkpointed = json.loads(out.read_text())
    return plain, checkpointed


@pytest.mark.parametrize("kind", [PolicyWorker, CriticWorker])
def test_checkpointing_saves_memory_and_changes_nothing(kind: Any, tiny_model: Path, tmp_path: Path) -> None:
    plain, checkpointed = bytes_of(kind, tiny_model, tmp_path)
    assert checkpointed < plain / 2


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
NOISY = {
    "opt": hf.OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, dropout=0.2, layerdrop=0.5),
    "mixtral": hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5),
    "falcon": hf.FalconConfig(**SMALL, hidden_dropout=0.3, attention_dropout=0.3),
    "gpt2": hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, attn_pdrop=0.3, embd_pdrop=0.3),
    "gptj": hf.GPTJConfig(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, vocab_size=40, resid_pdrop=0.3),
    "starcoder2": hf.Starcoder2Config(**SMALL, num_key_value_heads=2, residual_dropout=0.3, embedding_dropout=0.3),
}


@pytest.mark.parametrize("name", NOISY)
def test_training_mode_computes_what_eval_mode_does(name: str) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(NOISY[name])
    before = model.config.to_dict()
    tokens = torch.arange(2, 26).view(2, 12)
    expected = model.eval()(tokens, use_cache=False).logits
    assert not torch.equal(model.train()(tokens, use_cache=False).logits, expected), "there is noise to turn off"
    turn_off_noise(model)
    for _ in range(5):
        assert torch.equal(model.train()(tokens, use_cache=False).logits, expected)
    assert model.config.to_dict() == before, "an export writes the model's own"


def test_rows_have_seeds_whatever_the_runs_seed() -> None:
    rows = torch.arange(4)
    assert row_seeds(0, 3, rows).tolist() == [3 * 1_000_003 + i for i in range(4)], "those of before"
    for seed in (1, 20241127, 2**32, 2**63 - 1):
        seeds = row_seeds(seed, 10**6, rows)
        assert seeds.dtype == torch.int64
        assert (seeds >= 0).all()
        assert len(set(seeds.tolist())) == 4
        for s in seeds.tolist():
            torch.Generator().manual_seed(s)
