"""Turn scored samples into the padded tensors that trainers take, and measure them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvpo_service.algo.diagnostics import between_groups
from dvpo_service.types import Metrics, Prompt, Rollouts, Sample, Score, answer_text


def collate(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]], scores: Sequence[Sequence[Score]]
) -> Rollouts:
    """Return the batch, with a row per sample.

    The outcome reward is put on the last response token. A sample whose scoring failed keeps its row, but no token of
    it is valid in the mask: batch shapes stay the same, and the sample enters no loss and no mean.

    Args:
      groups: ``groups[i]`` are the samples of ``prompts[i]``.
      scores: ``scores[i]`` are the scores of ``groups[i]``.
    """
    pairs = [(p, s) for p, group in zip(prompts, groups, strict=True) for s in group]
    flat = [score for group in scores for score in group]
    lens = torch.tensor([len(s.token_ids) for _, s in pairs])
    outcome = torch.tensor([s.reward for s in flat], dtype=torch.float32)
    scored = torch.tensor([s.error is None for s in flat])
    steps = torch.arange(int(lens.max()))
    mask = (steps < lens[:, None]) & scored[:, None]
    rewards = torch.where(mask & (steps == lens[:, None] - 1), outcome[:, None], 0.0)
    return Rollouts(
        tokens=_pad([torch.tensor(p.token_ids + s.token_ids) for p, s in pairs]),
        prompt_lens=torch.tensor([len(p.token_ids) for p, _ in pairs]),
        response_lens=lens,
        response_mask=mask,
        rollout_logprobs=torch.where(mask, _pad([torch.tensor(s.logprobs) for _, s in pairs]), 0.0),
        rewards=rewards,
        scores=outcome,
        clean_scores=torch.tensor([s.clean for s in flat], dtype=torch.float32),
        finished=torch.tensor([s.finish_reason == "stop" for _, s in pairs]),
        prompt_index=torch.tensor([p.index for p, _ in pairs]),
        weight_version=torch.tensor([s.weight_version for _, s in pairs]),
    )


def rollout_metrics(rollouts: Rollouts, group_size: int, version: int) -> Metrics:
    """Return metrics of a batch. Rewards are averaged over scored samples, lengths over all samples.

    Args:
      group_size: samples per prompt.
      version: the number of updates of the policy's weights, from which staleness is counted.
    """
    groups = rollouts.scores.view(-1, group_size)
    return {
        "reward/mean": float(rollouts.scores.nanmean()),
        "reward/clean_mean": float(rollouts.clean_scores.nanmean()),
        "reward/failed": float(rollouts.scores.isnan().sum()),
        "reward/groups_without_spread": float(without_spread(groups).float().mean()),
        "reward/between_prompts": between_groups(groups),
        "rollout/response_length": float(rollouts.response_lens.float().mean()),
        "rollout/truncated": float((~rollouts.finished).float().mean()),
        "rollout/staleness": float((version - rollouts.weight_version).max()),
        "rollout/tokens": float(rollouts.response_lens.sum()),
    }


def without_spread(groups: Tensor) -> Tensor:
    """Return [groups] bool, whether the scored samples of a group [groups, samples] are all equal; NaN is unscored."""
    lowest = groups.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amin(1)
    highest = groups.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1)
    return highest <= lowest


def readable_rows(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]], scores: Sequence[Sequence[Score]]
) -> list[dict[str, Any]]:
    """Return one dict per sample with its texts and scores, for people to read."""
    return [
        {
            "prompt": prompt.messages[-1]["content"],
            "response": sample.text,
            "answer": answer_text(prompt.answer),
            "reward": score.reward,
            "clean_reward": score.clean,
            "finish_reason": sample.finish_reason,
            "error": score.error or "",
        }
        | {f"reward_{part.name}": part.raw for part in score.parts}
        for prompt, group, row in zip(prompts, groups, scores, strict=True)
        for sample, score in zip(group, row, strict=True)
    ]


def _pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)
