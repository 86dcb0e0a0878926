"""Best of n by risk: sample n responses, value each, and return the best by the mean or a tail of its distribution."""

from __future__ import annotations

import json
from typing import Any

from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.policy import PolicyServer
from dvpo_service.serving.replicas import Replicas
from dvpo_service.serving.requests import Kind
from dvpo_service.serving.returned import Returned
from dvpo_service.serving.value_server import ValueServer
from dvpo_service.serving.values import RankBy, rank


async def best_of_n(
    kind: Kind, request: dict[str, Any], by: RankBy, policy: Replicas, values: Replicas
) -> tuple[dict[str, Any], str]:
    """Sample ``n`` responses per prompt, and keep the best of each prompt.

    Args:
      request: a request of OpenAI's API, without ``rank_by``.
      by: "mean", "cvar" or "upper_tail" of the value distribution after the text that is returned.

    Returns:
      (OpenAI's body with one choice per prompt, and the texts and values of all choices under "ranking", best first;
      the version of the policy's weights).

    Raises:
      BadRequest: the engine refused the request; the message is the engine's.
    """
    keep_ids = bool(request.get("return_token_ids"))
    response = await policy.call(PolicyServer.complete, kind, request | {"return_token_ids": True})
    answer = json.loads(response.body)
    if response.status != 200:
        error = answer["error"]
        raise BadRequest(error["message"], status=response.status, param=error.get("param"), kind=error["type"])
    choices = answer["choices"]
    n = request.get("n") or 1
    skip = request.get("skip_special_tokens") is not False
    responses = [Returned.of(c, c.get("prompt_token_ids") or answer["prompt_token_ids"], skip) for c in choices]
    scores = await values.call(ValueServer.score, responses)
    answer["choices"] = []
    answer["ranking"] = []
    for first in range(0, len(choices), n):
        group = slice(first, first + n)
        order = rank(scores[group], by)
        answer["choices"].append(choices[group][order[0]] | {"index": first // n})
        answer["ranking"] += [
            {
                "prompt": first // n,
                "index": i,
                "text": responses[first + i].text,
                "mean": scores[first + i].mean[-1],
                "cvar": scores[first + i].cvar[-1],
                "upper_tail": scores[first + i].upper_tail[-1],
            }
            for i in order
        ]
    answer["rank_by"] = by
    if not keep_ids:
        _drop_ids(answer)
    return answer, response.version


def _drop_ids(answer: dict[str, Any]) -> None:
    for part in (answer, *answer["choices"]):
        part.pop("prompt_token_ids", None)
        part.pop("token_ids", None)
