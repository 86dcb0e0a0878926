"""Seeds for sampling responses and for the noise on their scores."""

from __future__ import annotations

import hashlib


def sample_seed(run_seed: int, epoch_or_step: int, prompt_index: int, sample_index: int, occurrence: int = 0) -> int:
    """Return a seed in [0, 2**63), the same on every machine and in every process.

    ``occurrence`` counts how often the step drew the prompt before: a prompt drawn twice is sampled twice, not copied.
    """
    text = f"{run_seed}:{epoch_or_step}:{prompt_index}:{sample_index}" + (f":{occurrence}" if occurrence else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
