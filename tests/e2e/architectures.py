"""Tiny random models of real architectures, and what a run does to each: sample, score, update, push, again.

``python -m tests.e2e.architectures OUT NAME ...`` writes a JSON line for each model. One process for all of them: most
of a start is the import of vLLM.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from actors.cluster.pool import Rendezvous
from actors.rollouts.engine import VllmEngine
from actors.training.policy import PolicyWorker
from dvpo_service.algo.diagnostics import rollout_kl_metrics, rollout_kl_sums
from dvpo_service.config import Config
from dvpo_service.data.collate import collate
from dvpo_service.host.network import free_port
from dvpo_service.models.small import character_tokenizer
from dvpo_service.types import Prompt, Rollouts, Sampling, Score
from tests.builders import make_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.25,  # so large that a mask that is wrong or a cap that is left out shows
    "tie_word_embeddings": False,
}
OWN_HEAD_SIZE = {k: v for k, v in SMALL.items() if k != "head_dim"}
ROLLOUT = {"prompts_per_step": 4, "n": 2, "max_new_tokens": 16, "enforce_eager": True}
EXPERTS = {"num_experts_per_tok": 2, "router_jitter_noise": 0.1}

# What is told apart: grouped heads, windows, soft caps, two RoPEs, fused projections, norms elsewhere, experts, noise.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL, attention_dropout=0.3),
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(**OWN_HEAD_SIZE),
    "qwen3": lambda: hf.Qwen3Config(**SMALL | {"tie_word_embeddings": True}),
    "gemma2": lambda: hf.Gemma2Config(
        **SMALL | {"tie_word_embeddings": True},
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=32,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 6, "tie_word_embeddings": True}, sliding_window=8, query_pre_attn_scalar=32
    ),
    "phi3": lambda: hf.Phi3Config(**OWN_HEAD_SIZE | {"num_key_value_heads": 2}, resid_pdrop=0.2),
    "olmo2": lambda: hf.Olmo2Config(**OWN_HEAD_SIZE | {"num_key_value_heads": 2}),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in OWN_HEAD_SIZE.items() if k != "num_key_value_heads"}),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4, **EXPERTS),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=48, num_experts_per_tok=2),
}


def write_model(folder: Path, name: str) -> Path:
    """Write a random model with a tokenizer of characters; return its folder."""
    tokenizer = character_tokenizer()
    torch.manual_seed(7)
    config = CONFIGS[name]()
    config.vocab_size = len(tokenizer) + 60
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # norms away from one and biases away from zero, so that one left out shows
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


class LocalEngines:
    """The part of ``EngineClient`` that the policy's worker uses, for one engine in this process."""

    def __init__(self, engine: VllmEngine, loop: asyncio.AbstractEventLoop):
        self.engine, self.loop = engine, loop
        self.membership, self.lost = ("local",), {}

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a call of the engine."""
        return self.loop.run_until_complete(asyncio.wait_for(call, 120))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self.run(getattr(self.engine, name)(*args))


def try_model(folder: Path, name: str) -> dict[str, Any]:
    """Train a model for two updates.

    Returns the KL of engine and trainer before, between and after them (``kl``), and how far the updates moved the
    policy: the KL between the first samples' log-probs then and at the end (``moved``).
    """
    started = time.perf_counter()
    model = str(write_model(folder, name))
    policy = {"micro_batch_size": 4, "gradient_checkpointing": True, "packing": True, "optim": {"lr": 0.01}}
    config = make_config(model, policy=policy, rollout=ROLLOUT)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    worker = PolicyWorker(config, model, Rendezvous(0, 1, "127.0.0.1", free_port(), 60))
    engine = VllmEngine(config, model, "safetensors")
    engines = LocalEngines(engine, asyncio.new_event_loop())
    kls, first = [], None
    try:
        engines.run(engine.start())
        for step in range(3):
            worker.send_weights(engines, "safetensors")  # type: ignore[arg-type]
            engines.run(engine.set_version(step))
            rollouts = sampled(engines, config)
            answer = worker.logprobs(rollouts, step)
            logprobs = torch.empty_like(answer.logprobs).index_copy(0, answer.rows, answer.logprobs)
            kls.append(kl_of(logprobs, rollouts))
            if step == 2:
                break
            first = first or rollouts
            worker.update(rollouts, {"logprobs": logprobs}, torch.randn(rollouts.rewards.shape), step)
        assert first is not None
        moved = kl_of(worker.score(first), first)
    finally:
        engines.run(engine.stop())
    return {"name": name, "kl": kls, "moved": moved, "seconds": time.perf_counter() - started}


def kl_of(logprobs: torch.Tensor, rollouts: Rollouts) -> float:
    """Return the KL per token of the engine's log-probs from the trainer's."""
    return rollout_kl_metrics(rollout_kl_sums(logprobs, rollouts.rollout_logprobs, rollouts.response_mask))[
        "policy/rollout_kl"
    ]


def sampled(engines: LocalEngines, config: Config) -> Rollouts:
    """Return responses to prompts longer than the sliding windows."""
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "1", "x", tuple(range(4, 16 + i))) for i in range(4)]
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=config.rollout.max_new_tokens)
    groups = engines.run(engines.engine.generate(prompts, sampling, [1, 2, 3, 4]))
    return collate(prompts, groups, [[Score(1.0, 1.0)] * 2] * 4)


def main(folder: str, *names: str) -> None:
    """Try each model; an error is that model's result."""
    torch.set_num_threads(1)
    for name in names:
        try:
            result = try_model(Path(folder), name)
        except Exception as error:  # noqa: BLE001 - whatever failed is what is reported of this model
            result = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


if __name__ == "__main__":
    main(*sys.argv[1:])
