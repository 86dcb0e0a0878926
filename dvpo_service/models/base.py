"""``RUN/base``: config and tokenizer of the model a run started from, without its weights.

With it a checkpoint, which holds weights only, becomes a model later and on another machine.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from dvpo_service.errors import CheckpointError
from dvpo_service.models.load import load_model_config, load_tokenizer, quiet

FOLDER = "base"


def save_base(model_path: str, run_dir: Path, *, trust_remote_code: bool = False) -> None:
    """Keep in ``run_dir/base`` what building the model and its tokenizer takes."""
    folder = run_dir / FOLDER
    load_model_config(model_path, trust_remote_code=trust_remote_code).save_pretrained(folder)
    load_tokenizer(model_path, trust_remote_code=trust_remote_code).save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except OSError:  # a model may come without one
        return
    generation.save_pretrained(folder)


def base_folder(run_dir: Path) -> Path:
    """Raises CheckpointError where the run has kept none."""
    folder = run_dir / FOLDER
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{run_dir}: no {FOLDER}/config.json, without which its checkpoints are weights of an unknown model. "
            "Leave checkpoints in their run directory; `dvpo train` writes it when it starts or continues a run"
        )
    return folder


def empty_policy(base: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal LM in float32 on the CPU, its weights left as memory has them: to be loaded."""
    return _empty(AutoModelForCausalLM, base, trust_remote_code)


def empty_backbone(base: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The same without its language-model head, for a critic."""
    return _empty(AutoModel, base, trust_remote_code)


def _empty(auto: type, base: Path, trust_remote_code: bool) -> nn.Module:
    quiet()
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with no_init_weights():
            return auto.from_config(  # type: ignore[attr-defined]
                config, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"no model can be built from {base}: {reason}") from error
