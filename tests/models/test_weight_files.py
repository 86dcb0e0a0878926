"""Weights are written as ``save_pretrained`` writes them, a file at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from dvpo_service.models import weight_files
from dvpo_service.models.load import load_causal_lm
from dvpo_service.models.weight_files import INDEX_FILE, read_weights, write_weights
from dvpo_service.models.whole import as_in_files, gathered, saved, shapes

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "tied": hf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "experts": hf.MixtralConfig(**SMALL, num_local_experts=3),
}


def write(model: Any, folder: Path) -> None:
    weights = saved(model)
    model.save_pretrained(folder, state_dict={})
    write_weights(as_in_files(model, shapes(weights)), as_in_files(model, gathered(weights)), folder)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("limit", [5 * 10**9, 20_000])
def test_the_files_are_those_of_save_pretrained(
    name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", limit)
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path / "base")
    model: Any = load_causal_lm(str(tmp_path / "base"))
    write(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    ours, theirs = (
        {f.name: f.read_bytes() for f in folder.iterdir()} for folder in (tmp_path / "ours", tmp_path / "theirs")
    )
    if INDEX_FILE in theirs:
        pairs = [json.loads(files.pop(INDEX_FILE)) for files in (ours, theirs)]
        assert pairs[0]["weight_map"].keys() == pairs[1]["weight_map"].keys()
        assert pairs[0]["metadata"] == pairs[1]["metadata"]
    else:
        assert ours == theirs, "to the bit"
    again: Any = load_causal_lm(str(tmp_path / "ours"))
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in model.state_dict().items())


def test_a_file_leaves_memory_when_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 400)
    weights = {f"{i}": torch.full((100,), float(i)) for i in range(4)}
    before: list[int] = []

    def watched() -> Any:
        for item in weights.items():
            before.append(len(list(tmp_path.glob("*.safetensors"))))
            yield item

    write_weights(weights.items(), watched(), tmp_path)
    assert before == [0, 1, 2, 3]
    read: dict[str, Tensor] = read_weights(tmp_path)
    assert all(torch.equal(read[k], weights[k]) for k in weights)


def test_a_rank_that_does_not_write_takes_part(tmp_path: Path) -> None:
    taken = iter([("a", torch.zeros(2))])
    write_weights([("a", torch.zeros(2))], taken, None)
    assert next(taken, None) is None
