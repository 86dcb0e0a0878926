"""``RUN/base``: config and tokenizer of the model that a run started from, without its weights.

A checkpoint holds weights only. With this folder it can be turned into a model later and on another machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from dvpo_service.errors import CheckpointError, one_line
from dvpo_service.models.load import (
    compute_soft_caps,
    load_model_config,
    load_tokenizer,
    make_savable,
    quiet,
    text_model,
)

FOLDER = "base"
ORIGIN = "origin.json"  # the model's name or path, which says where its weights are


def save_base(model_path: str, run_dir: Path, *, trust_remote_code: bool = False) -> None:
    """Write to ``run_dir/base`` the config and the tokenizer files from which the model can be built again.

    Args:
      model_path: a folder or hub name. Raises CheckpointError when it cannot be loaded.
    """
    folder = run_dir / FOLDER
    load_model_config(model_path, trust_remote_code=trust_remote_code).save_pretrained(folder)
    load_tokenizer(model_path, trust_remote_code=trust_remote_code).save_pretrained(folder)
    path = Path(model_path)
    (folder / ORIGIN).write_text(json.dumps({"model": str(path.absolute()) if path.exists() else model_path}) + "\n")
    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except OSError:  # a model may come without a generation config
        return
    make_savable(generation)
    generation.save_pretrained(folder)


def base_folder(run_dir: Path) -> Path:
    """Return ``run_dir/base``. Raises CheckpointError when the run has not written it."""
    folder = run_dir / FOLDER
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{run_dir}: no {FOLDER}/config.json, without which its checkpoints are weights of an unknown model. "
            "Leave checkpoints in their run directory; `dvpo train` writes it when it starts or continues a run"
        )
    return folder


def origin(base: Path) -> str:
    """Return name or path of the model that a run started from. Raises CheckpointError when nothing tells."""
    try:
        return str(json.loads((base / ORIGIN).read_text())["model"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{base / ORIGIN}: cannot be read, and names the model that adapters are for") from error


def empty_policy(base: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the causal LM that ``base`` describes, with weights still to be loaded.

    Raises CheckpointError when no causal LM can be built from ``base``.
    """
    return _empty(AutoModelForCausalLM, base, trust_remote_code)


def empty_backbone(base: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model that ``base`` describes without its language-model head, for a critic.

    The weights are still to be loaded. Raises CheckpointError when no model can be built from ``base``.
    """
    return text_model(_empty(AutoModel, base, trust_remote_code))


def build_empty(auto: Any, folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """Return the architecture of ``folder/config.json`` in float32 on the CPU, with uninitialised weights.

    Args:
      auto: the transformers class to build with, such as ``AutoModel``.

    Raises:
      OSError, ValueError, KeyError, TypeError, ImportError: as transformers raises them.
    """
    quiet()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with no_init_weights():
        model = auto.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    model.tie_weights()  # the skipped initialisation would have tied them
    compute_soft_caps(model)
    return model


def _empty(auto: Any, base: Path, trust_remote_code: bool) -> nn.Module:
    try:
        return build_empty(auto, base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = one_line(error)
        raise CheckpointError(f"no model can be built from {base}: {reason}") from error
