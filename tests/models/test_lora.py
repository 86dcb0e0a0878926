"""Adapters: what the model computes with them and without, its merged weights, and what peft makes of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dvpo_service.config.pools import LoraConfig
from dvpo_service.errors import ConfigError
from dvpo_service.models.load import load_causal_lm
from dvpo_service.models.lora import adapters_off, add_adapter, merged, plain, write_adapter
from dvpo_service.models.policy_folder import write_policy
from dvpo_service.models.whole import saved
from tests.e2e.architectures import CONFIGS, write_model

LORA = LoraConfig(rank=4, alpha=8)
TOKENS = torch.arange(3, 27)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def disturb(model: Any) -> None:
    """Give B values, as training does; at first it is 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.fixture
def adapted(tiny_model: Path) -> Any:
    model = add_adapter(load_causal_lm(str(tiny_model)), LORA, seed=3)
    disturb(model)
    return model.eval()


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(tiny_model: Path) -> None:
    base = load_causal_lm(str(tiny_model)).eval()
    model = add_adapter(load_causal_lm(str(tiny_model)), LORA, seed=3).eval()
    assert torch.equal(logits(model), logits(base))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    again = add_adapter(load_causal_lm(str(tiny_model)), LORA, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), "one seed"


def test_without_its_adapters_it_is_the_base_model(adapted: Any, tiny_model: Path) -> None:
    base = load_causal_lm(str(tiny_model)).eval()
    with_adapter = logits(adapted)
    with adapters_off(adapted):
        assert torch.equal(logits(adapted), logits(base))
    assert torch.equal(logits(adapted), with_adapter)
    assert (with_adapter - logits(base)).abs().max() > 0.01


def test_merged_weights_are_those_of_an_equal_model_and_the_base_is_untouched(adapted: Any, tiny_model: Path) -> None:
    base = load_causal_lm(str(tiny_model)).eval()
    before = {n: x.clone() for n, x in plain(saved(adapted))}
    weights = dict(merged(adapted, saved(adapted)))
    assert weights.keys() == before.keys() == dict(saved(base)).keys()
    base.load_state_dict({n: x.detach() for n, x in weights.items()}, strict=False)
    assert_close(logits(base), logits(adapted), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[n], x) for n, x in plain(saved(adapted)))
    assert all(torch.equal(before[n], x) for n, x in saved(load_causal_lm(str(tiny_model))))


def test_an_export_loads_in_transformers_and_its_adapter_in_peft(
    adapted: Any, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    write_policy(adapted, tmp_path, lora=LORA, base=str(tiny_model))
    assert_close(logits(load_causal_lm(str(tmp_path)).eval()), logits(adapted), rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(logits(model), logits(adapted), rtol=1e-5, atol=1e-5)
    write_adapter(saved(adapted), LORA, "x", None)  # a rank that does not write


@pytest.mark.parametrize("name", list(CONFIGS))
def test_merging_holds_for_every_architecture(name: str, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path, name))
    base = load_causal_lm(folder).eval()
    model = add_adapter(load_causal_lm(folder), LORA, seed=0).eval()
    disturb(model)
    base.load_state_dict({n: x.detach() for n, x in merged(model, saved(model))}, strict=False)
    assert (logits(model) - logits(load_causal_lm(folder).eval())).abs().max() > 1e-3
    assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-4)


def test_the_output_layer_and_experts_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the output layer gets no adapter"):
        add_adapter(load_causal_lm(str(tiny_model)), LoraConfig(target_modules=["q_proj", "lm_head"]), seed=0)
    experts = load_causal_lm(str(write_model(tmp_path, "mixtral")))
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        add_adapter(experts, LoraConfig(target_modules=["gate_up_proj"]), seed=0)
    with pytest.raises(ValidationError, match="at least 1 item"):
        LoraConfig(target_modules=[])


def test_a_target_that_the_model_lacks_is_named(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules=\['query'\]: .*query.*not found"):
        add_adapter(load_causal_lm(str(tiny_model)), LoraConfig(target_modules=["query"]), seed=0)
