"""A few fixed sequences with the log-probs that an exported model gives them: ``dvpo_check.json`` in its folder.

Whoever computes the model in another way (an engine that loaded the folder, or that changed its weights in place) can
be held against them without computing the model a second time.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dvpo_service.errors import CheckpointError, one_line

FILE = "dvpo_check.json"
TEXTS = (
    "27+65=29",
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "Natalia sold 48 clips in April and half as many in May. How many did she sell?",
)
LONGEST = 32  # tokens


@dataclass(frozen=True)
class FixedSequences:
    """Sequences and their log-probs.

    Attributes:
      token_ids: two tokens or more each.
      log_probs: of each token after a sequence's first, in nats, at temperature 1.
      dtype: the precision in which they were computed.
    """

    token_ids: list[list[int]]
    log_probs: list[list[float]]
    dtype: str = "float32"

    def cut(self, longest: int) -> FixedSequences:
        """Return the sequences without what is beyond ``longest`` tokens."""
        ids = [s[:longest] for s in self.token_ids]
        return FixedSequences(ids, [s[: longest - 1] for s in self.log_probs], self.dtype)

    def difference(self, log_probs: list[list[float]]) -> float:
        """Return the mean absolute difference to others' log-probs of the same tokens, in nats; inf if one is NaN."""
        ours, theirs = chain(*self.log_probs), chain(*log_probs)
        mean = fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return math.inf if math.isnan(mean) else mean

    def write(self, folder: Path) -> None:
        """Write ``dvpo_check.json`` to ``folder``."""
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n")


def bound(dtype: str) -> float:
    """Return the largest mean difference, in nats, that two computations of one model in ``dtype`` may have.

    Rounding gives about 1e-6 in float32 (measured on CPUs) and a few hundredths in bfloat16; other weights, or weights
    in another layout, give tenths to tens.
    """
    return 1e-3 if dtype == "float32" else 0.1


def record(lm: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``dvpo_check.json`` to ``folder``: the fixed sequences and what ``lm``, the model there, gives them."""
    sequences = fixed_token_ids(lm.config, tokenizer)
    FixedSequences(sequences, [_score(lm, ids) for ids in sequences]).write(folder)


def fixed_token_ids(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of the fixed sequences, two or more each, of a model of ``config``."""
    text_config = config.get_text_config()
    longest = min(LONGEST, getattr(text_config, "max_position_embeddings", None) or LONGEST)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in TEXTS]
    sequences = [ids for ids in encoded if len(ids) > 1 and max(ids) < text_config.vocab_size]
    # A tokenizer without letters has none.
    return sequences or [[i % text_config.vocab_size for i in range(min(longest, 8))]]


@torch.inference_mode()
def _score(lm: nn.Module, ids: list[int]) -> list[float]:
    was_training = lm.training
    lm.eval()
    tokens = torch.tensor([ids], device=next(lm.parameters()).device)
    logits = lm(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    lm.train(was_training)
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()


def recorded(folder: Path) -> FixedSequences | None:
    """Return what ``dvpo_check.json`` in ``folder`` holds, or None when there is no such file.

    Raises:
      CheckpointError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text())
        found = FixedSequences(tree["token_ids"], tree["log_probs"], tree.get("dtype", "float32"))
        fit = [len(ids) - 1 == len(scores) > 0 for ids, scores in zip(found.token_ids, found.log_probs, strict=True)]
        if not fit or not all(fit):
            raise ValueError("not one log-prob for each token after the first")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({one_line(error, 100)}); export the state again") from error
    return found
