"""Hold an engine against the log-probs that an exported folder records, after every load of weights."""

from __future__ import annotations

from typing import Any

from dvpo_service.models.fixed_sequences import FILE, FixedSequences, bound


async def why_wrong(engine: Any, fixed: FixedSequences | None, dtype: str, longest: int) -> str | None:
    """Return in words how an engine's log-probs differ from the recorded ones; None where they are the same.

    Args:
      engine: a vLLM engine.
      fixed: what the folder of its weights records; None when it records nothing, and nothing is compared.
      dtype: the engine's precision; it says how much is rounding (``bound``).
      longest: the longest sequence that the engine reads, in tokens.
    """
    if fixed is None or longest < 3:
        return None
    fixed = fixed.cut(longest - 1)  # an engine adds a token
    difference = fixed.difference(await _scores(engine, fixed))
    allowed = max(bound(dtype), bound(fixed.dtype))
    if difference <= allowed:
        return None
    return (
        f"the engine's log-probs of the sequences in {FILE} differ by {difference:.2g} nats on average from those that "
        f"were recorded at the export; in {dtype}, {allowed:g} is allowed. Either the folder's weights are not "
        f"those that were exported, or vLLM computes this model in another way. Without {FILE} it is served unchecked"
    )


async def _scores(engine: Any, fixed: FixedSequences) -> list[list[float]]:
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    scores = []
    for i, ids in enumerate(fixed.token_ids):
        outputs = [o async for o in engine.generate({"prompt_token_ids": ids}, settings, f"dvpo-check-{i}")]
        rows = outputs[-1].prompt_logprobs[1:]
        scores.append([row[token].logprob for token, row in zip(ids[1:], rows, strict=True)])
    return scores
