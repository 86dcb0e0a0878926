"""Small random reward models of real architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Qwen2ForSequenceClassification

from dvpo_service.models.small import character_tokenizer, small_config


def save_reward_model(folder: Path, kind: str, *, template: bool = True, head: bool = True) -> Path:
    """Write an untrained reward model, a ``decoder`` with one label or an ``encoder`` with three."""
    tokenizer: Any = character_tokenizer()
    if not template:
        tokenizer.chat_template = None
    torch.manual_seed(1)
    if kind == "decoder":
        config: Any = small_config(hidden_size=64, num_layers=2, num_heads=2, max_positions=128)
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        model: Any = Qwen2ForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight)
    else:
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            num_labels=3,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = BertForSequenceClassification(config)
        torch.nn.init.normal_(model.classifier.weight)
    (model if head else model.model).save_pretrained(folder)
    if not head:  # a folder whose config promises a head
        model.config.architectures = ["Qwen2ForSequenceClassification"]
        model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
