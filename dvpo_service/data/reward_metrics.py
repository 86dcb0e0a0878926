"""What rewards measured besides their score, as metrics: by source, and by reward where there are several."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from dvpo_service.types import Metrics, Prompt, Score


def reward_metrics(prompts: Sequence[Prompt], scores: Sequence[Sequence[Score]]) -> Metrics:
    """Return metrics of a batch.

    ``reward/source/<source>/<metric>`` is the mean of a reward's own metric over the responses that have it.
    ``reward/part/<name>/raw`` and ``/weighted`` are the means of one of several rewards, as it scored and times its
    weight, over the responses that it could score; ``/failed`` counts the others.

    Args:
      scores: ``scores[i]`` are the scores of the responses to ``prompts[i]``.
    """
    own: dict[str, list[float]] = defaultdict(list)
    raw: dict[str, list[float]] = defaultdict(list)
    weighted: dict[str, list[float]] = defaultdict(list)
    for prompt, group in zip(prompts, scores, strict=True):
        for score in group:
            for name, value in score.metrics.items():
                own[f"reward/source/{prompt.source}/{name}"].append(value)
            for part in score.parts:
                raw[part.name].append(part.raw)
                weighted[part.name].append(part.weighted)
    metrics = {name: _mean(values) for name, values in own.items()}
    for name, values in raw.items():
        metrics[f"reward/part/{name}/raw"] = _mean(values)
        metrics[f"reward/part/{name}/weighted"] = _mean(weighted[name])
        metrics[f"reward/part/{name}/failed"] = float(sum(math.isnan(v) for v in values))
    return metrics


def _mean(values: Iterable[float]) -> float:
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan
