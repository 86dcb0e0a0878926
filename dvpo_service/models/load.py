"""Loading of Hugging Face models by folder or hub name, with errors that say which folder failed and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, logging

from dvpo_service.errors import CheckpointError, one_line

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def check_model_folder(path: str) -> None:
    """Raise CheckpointError when ``path`` is a folder that does not hold a loadable model.

    A path that does not exist is taken for a hub name, unless it looks like a file path: then it raises too.
    """
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise CheckpointError(f"model.path {path}: no such folder")
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model.path {path}: no config.json, so this is no Hugging Face model folder")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise CheckpointError(
            f"model.path {path}: config.json is there but no weights; expected *.safetensors "
            "(save with model.save_pretrained)"
        )


def check_model(path: str | None, tokens: int, *, trust_remote_code: bool = False) -> None:
    """Raise CheckpointError when ``path`` has no loadable config or its model reads fewer than ``tokens`` tokens.

    Do nothing when ``path`` is None.
    """
    if path is None:
        return
    limit = context_length(load_model_config(path, trust_remote_code=trust_remote_code))
    if limit is not None and tokens > limit:
        raise CheckpointError(
            f"model {path} reads {limit} tokens, but data.max_prompt_tokens + rollout.max_new_tokens = {tokens}; "
            "lower one of them"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model reads, with the scaling of its rotary positions; None where nothing limits it.

    Linear, dynamic and YaRN scaling make a model read ``factor`` times what it was trained on. Other kinds (Llama 3's,
    LongRoPE, Gemma 3's by type of layer) have the longer limit in ``max_position_embeddings`` already. vLLM's rule.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if limit is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return limit
    trained = rope.get("original_max_position_embeddings") if rope["rope_type"] == "yarn" else limit
    return int((trained or limit) * rope.get("factor", 1.0))


def load_model_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the model's config. Raises CheckpointError when it cannot be loaded."""
    return _load(AutoConfig, path, trust_remote_code=trust_remote_code)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer. Raises CheckpointError when it cannot be loaded."""
    return _load(AutoTokenizer, path, trust_remote_code=trust_remote_code)


def load_causal_lm(
    path: str, *, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> nn.Module:
    """Return the causal LM at ``path``, in float32 unless told otherwise: the optimizer's precision.

    The trainer chooses the precision of the computation.

    Args:
      kwargs: for ``from_pretrained``.

    Raises:
      CheckpointError: the model cannot be loaded, or its files lack some of its weights.
    """
    model: Any = _load_model(AutoModelForCausalLM, path, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    compute_soft_caps(model)
    if model.generation_config is not None:
        make_savable(model.generation_config)
    return model


def make_savable(config: GenerationConfig) -> None:
    """Turn sampling on in a generation config that says how to sample and also not to.

    transformers loads such a config with a warning and refuses to save it; some models of the hub have one.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def load_backbone(
    path: str, *, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> nn.Module:
    """Return the same network without its language-model head, for a critic. See ``load_causal_lm``.

    Of a model that reads images too, this is its language model.
    """
    model = _load_model(AutoModel, path, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    compute_soft_caps(model)
    return text_model(model)


def text_model(model: Any) -> Any:
    """Return the language model of a model that wraps one (its config has a ``text_config``), else the model itself."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def compute_soft_caps(model: Any) -> None:
    """Give a model that caps its attention logits (Gemma 2) an attention implementation that computes the cap.

    transformers' default, torch's ``scaled_dot_product_attention``, leaves the cap out without a word. Attention sinks
    need nothing here: models that have them refuse that default themselves.
    """
    if not any(getattr(module, "attn_logit_softcapping", None) for module in model.modules()):
        return
    flash = torch.cuda.is_available() and is_flash_attn_2_available()
    model.set_attn_implementation("flash_attention_2" if flash else "eager")


def _load_model(auto: Any, path: str, **kwargs: Any) -> Any:
    """Return a model, of which every weight comes from its files: transformers would make up those that are missing."""
    model, found = _load(auto, path, output_loading_info=True, **kwargs)
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise CheckpointError(
            f"cannot load a model from {path}: its files lack {len(names)} of its weights, {names[0]} among them; "
            "give a folder with all of them"
        )
    return model


def _load(auto: Any, path: str, **kwargs: Any) -> Any:
    check_model_folder(path)
    quiet()
    try:
        return auto.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)
        raise CheckpointError(f"cannot load a model from {path}: {reason}") from error


def quiet() -> None:
    """Turn off transformers' progress bars and warnings.

    The bars would break up this service's own output, and the warnings report that a critic's backbone has no
    language-model head.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
