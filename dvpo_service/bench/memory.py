"""Memory of a trainer's rank: loading of a model of a billion parameters, and log-probs over 152,064 words.

Each figure is the growth of the resident memory of processes of their own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.initialization import no_init_weights

from dvpo_service.bench.logprobs_memory import VOCABULARY, peak_gib
from dvpo_service.bench.peaks import GIB, peaks
from dvpo_service.models.critic import DistributionalCritic
from dvpo_service.models.policy import PolicyModel
from dvpo_service.models.sharded_load import load_sharded
from dvpo_service.models.sharding import all_ranks, shard

WORLDS = (1, 2, 4)


def run(hidden: int = 1536, layers: int = 12, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Return the peaks, in GiB, of log-probs and their backward pass, and of a rank that loads its shard of a model.

    Args:
      hidden, layers, vocabulary: sizes of the model that is loaded; by default it has a billion parameters.
    """
    cases = (("plain", 1024), ("chunked", 1024), ("chunked", 8192))
    heads = {f"{form}_{tokens}": peak_gib(form, tokens) for form, tokens in cases}
    with tempfile.TemporaryDirectory() as folder:
        sizes = _save(Path(folder), hidden, layers, vocabulary)
        loading = {
            pool: {str(world): _largest(peaks(_load, (folder, pool), world)) for world in WORLDS}
            for pool in ("policy", "critic")
        }
    return {"logprobs_peak_gib": heads, "model": sizes, "loading_peak_gib": loading}


def _largest(ranks: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def _save(folder: Path, hidden: int, layers: int, vocabulary: int) -> dict[str, float]:
    """Write a model in bfloat16, in several files; return its sizes."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=6 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    parameters = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    return {"parameters": parameters, "float32_gib": 4 * parameters / GIB, "layer_float32_gib": 4 * layer / GIB}


def _load(folder: str, pool: str) -> Any:
    mesh = all_ranks(torch.device("cpu"))

    def build(model: Any) -> Any:
        if pool == "policy":
            return shard(PolicyModel(model, temperature=1.0), mesh, bfloat16=True)
        return shard(
            DistributionalCritic(model, width=256, num_heads=3, num_quantiles=200, seed=0), mesh, bfloat16=True
        )

    return load_sharded(folder, build, mesh, head=pool == "policy")
