"""A sharded model reads its own rows of the files, and is the model that every other way of loading gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import core_model_loading
from transformers.distributed.sharding_utils import DtensorShardOperation

from actors.cluster.pool import Rendezvous
from actors.training.process_group import init_process_group
from dvpo_service.errors import CheckpointError
from dvpo_service.host.network import free_port
from dvpo_service.models.load import load_backbone, load_causal_lm
from dvpo_service.models.policy import PolicyModel
from dvpo_service.models.sharded_load import load_sharded
from dvpo_service.models.sharding import all_ranks, shard
from tests.processes import run_ranks

SMALL: dict[str, Any] = {
    "vocab_size": 61,  # odd: ranks have different numbers of rows
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tied": (hf.Qwen2Config, {"tie_word_embeddings": True}),
    "capped": (hf.Gemma2Config, {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16}),
    "experts": (hf.MixtralConfig, {"num_local_experts": 4}),
    "uneven experts": (hf.MixtralConfig, {"num_local_experts": 3}),
    "images": (
        hf.Gemma3Config,
        {
            "text_config": SMALL | {"sliding_window": 8},
            "vision_config": VISION | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
}


def save(name: str, folder: Path) -> None:
    """Write a model of random weights in bfloat16, in several files."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    config = kind(**(sizes if name == "images" else SMALL | sizes))
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / name, max_shard_size="8KB")
    assert len(list((folder / name).glob("*.safetensors"))) > 1


class Counted:
    """Counts the elements that transformers reads from files: ``rows`` of sharded tensors, and ``whole`` ones."""

    def __init__(self) -> None:
        self.rows = self.whole = 0
        slices, copies = DtensorShardOperation.shard_tensor, core_model_loading._materialize_copy

        def shard_tensor(*args: Any, **kwargs: Any) -> Any:
            read = slices(*args, **kwargs)
            self.rows += 0 if read is None else read.numel()
            return read

        def copy(*args: Any, **kwargs: Any) -> Any:
            read = copies(*args, **kwargs)
            self.whole += read.numel()
            return read

        self.patches = (
            patch.object(DtensorShardOperation, "shard_tensor", shard_tensor),
            patch.object(core_model_loading, "_materialize_copy", copy),
        )


def load(path: Path, rank: int, *, head: bool) -> tuple[dict[str, Tensor], Counted, int]:
    """Return the gathered state and buffers of the sharded model, what was read, and the elements of the shard."""
    mesh = all_ranks(torch.device("cpu"))

    def build(lm: Any) -> Any:
        module = PolicyModel(lm, temperature=1.0) if head else lm
        return shard(module, mesh, bfloat16=False, checkpointing=True)

    count = Counted()
    with count.patches[0], count.patches[1]:
        module = load_sharded(str(path), build, mesh, head=head)
    backbone = module.backbone if head else module
    assert backbone.training, "checkpointing takes training mode"
    assert getattr(backbone.config, "distributed_config", None) is None
    parameters = list(backbone.parameters())
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in parameters)
    held = sum(p.to_local().numel() for p in parameters)
    with torch.no_grad():  # the first pass pads shards of uneven size
        tokens = torch.arange(2, 12).view(1, 10)
        module(tokens, torch.tensor([2]), torch.tensor([10]), 8) if head else module(tokens, use_cache=False)
    module.reshard()
    state = {name: p.full_tensor() for name, p in backbone.named_parameters()}
    return state | dict(backbone.named_buffers()), count, held


def _rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init_process_group(Rendezvous(rank, 2, "127.0.0.1", port, 60))
    for name in MODELS:
        for head in (True, False):
            plain: Any = (load_causal_lm if head else load_backbone)(str(folder / name))
            state, read, held = load(folder / name, rank, head=head)
            wanted = dict(plain.named_parameters()) | dict(plain.named_buffers())
            assert state.keys() == wanted.keys(), name
            assert all(torch.equal(state[k], wanted[k]) for k in wanted), name
            if name == "uneven experts":  # in turns, whole
                assert read.rows == 0
                assert read.whole >= sum(p.numel() for p in plain.parameters())
            else:
                vision = 0 if head or name != "images" else read.whole  # what the critic does not keep is not sharded
                assert (read.rows, read.whole) == (held, vision), name
    os._exit(0)


def test_a_rank_reads_its_own_rows_and_gets_the_same_model(tmp_path: Path) -> None:
    for name in MODELS:
        save(name, tmp_path)
    run_ranks(_rank, (free_port(), tmp_path), 2)


def test_weights_that_are_not_in_the_files_are_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    hf.AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path)
    weights = load_file(tiny_model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 of its weights, lm_head\.weight"):
        load_causal_lm(str(tmp_path))
    load_backbone(str(tmp_path))
