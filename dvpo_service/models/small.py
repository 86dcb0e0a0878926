"""A small untrained causal LM: Qwen2 architecture, character-level tokenizer.

It is saved in Hugging Face format, so that all other code treats it like any model folder or hub name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
# Tokens that stand for right and wrong in a judgement: bytes that no UTF-8 text has, so none that an answer needs.
VERDICTS = (bytes_to_unicode()[0xFE], bytes_to_unicode()[0xFF])

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + m['content'] + '" + EOS + "' }}"
    "{% else %}{{ '" + USER + "' + m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def character_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level BPE without merges: one token per ASCII character; any UTF-8 text round-trips.

    It has to be a ``Qwen2Tokenizer``, because transformers loads the class registered for the model type, whatever
    class was saved.
    """
    vocab = {token: i for i, token in enumerate([PAD, EOS, USER, ASSISTANT, *bytes_to_unicode().values()])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,  # type: ignore[arg-type]
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def save_small_model(
    folder: Path, *, hidden_size: int, num_layers: int, num_heads: int, max_positions: int, seed: int
) -> None:
    """Write an untrained model and its tokenizer to ``folder`` (safetensors, float32)."""
    tokenizer = character_tokenizer()
    config = small_config(
        hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, max_positions=max_positions
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_config(*, hidden_size: int, num_layers: int, num_heads: int, max_positions: int) -> Qwen2Config:
    """Return the config of the model that ``save_small_model`` writes."""
    tokenizer = character_tokenizer()
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
