"""Best of n by risk: sample n responses, value each, return the best by the mean or a tail of its distribution."""

from __future__ import annotations

import json
from typing import Any

from dvpo_service.serving.policy import Kind
from dvpo_service.serving.replicas import Replicas
from dvpo_service.serving.requests import BadRequest
from dvpo_service.serving.values import ResponseValues, ValueQuery, rank


async def best_of_n(
    kind: Kind, request: dict[str, Any], by: str, policy: Replicas, values: Replicas
) -> tuple[dict[str, Any], str]:
    """The answer with one choice a prompt, the best of its ``n``, and ``ranking`` with what each was worth.

    Returns the body and the version of the policy. Raises BadRequest with the engine's own error.
    """
    asked_for_ids = bool(request.get("return_token_ids"))
    made = await policy.call("complete", kind, request | {"return_token_ids": True})
    answer = json.loads(made.body)
    if made.status != 200:
        error = answer["error"]
        raise BadRequest(error["message"], status=made.status, param=error.get("param"), kind=error["type"])
    choices, n = answer["choices"], request.get("n") or 1
    queries = [
        ValueQuery(tuple(c.get("prompt_token_ids") or answer["prompt_token_ids"]), _text_ids(c), (), only_last=True)
        for c in choices
    ]
    found: list[ResponseValues] = await values.call("score", queries)
    answer["choices"], answer["ranking"] = [], []
    for first in range(0, len(choices), n):
        group = slice(first, first + n)
        order = rank(found[group], by)  # type: ignore[arg-type]
        answer["choices"].append(choices[group][order[0]] | {"index": first // n})
        answer["ranking"] += [
            {
                "prompt": first // n,
                "index": i,
                "mean": found[first + i].mean[-1],
                "cvar": found[first + i].cvar[-1],
                "upper_tail": found[first + i].upper_tail[-1],
            }
            for i in order
        ]
    answer["rank_by"] = by
    if not asked_for_ids:
        _drop_ids(answer)
    return answer, made.version


def _text_ids(choice: dict[str, Any]) -> tuple[int, ...]:
    """The response's tokens without the one that ended it: the critic has read the whole answer then.

    What follows the end of a response is no state that training ever saw.
    """
    ids = tuple(choice["token_ids"])
    return ids[:-1] if choice["finish_reason"] == "stop" else ids


def _drop_ids(answer: dict[str, Any]) -> None:
    for part in (answer, *answer["choices"]):
        part.pop("prompt_token_ids", None)
        part.pop("token_ids", None)
