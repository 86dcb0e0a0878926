"""Requests made from our own OpenAPI schema, right and wrong ones: none is answered with a 5xx.

A wrong type or a number beyond a limit is refused, and every answer is one that the schema names. Behind the gateway
are replicas in memory; the critic's reads its requests with a real tokenizer and chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from dvpo_service.models.small import CHAT_TEMPLATE, character_tokenizer
from dvpo_service.serving.value_server import ValueServer, encode
from tests.serving.fake_replicas import FakePolicy, FakeValues, gateway

# Not positive_data_acceptance: one field's limit may depend on another (prompts x n, prompt or messages).
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@dataclass
class ReadingValues(FakeValues):
    """Encodes what it is asked for, as a replica of the critic does."""

    tokenizer: Any = field(default_factory=character_tokenizer)

    def __post_init__(self) -> None:
        self.tokenizer.chat_template = CHAT_TEMPLATE

    async def call(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        if method is ValueServer.along:
            encode(self.tokenizer, args[0])
            return {"body": {"states": []}, "version": "step-000007"}
        return await super().call(method, *args, timeout_s=timeout_s)


app = gateway(FakePolicy(), ReadingValues(), max_new_tokens=40, max_n=8).app()
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


@schema.parametrize()
@settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_answered_as_the_schema_says(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)
