"""``serve``: how a trained policy and its value distributions are served."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from dvpo_service.config.base import NonNegativeFloat, Positive, PositiveFloat, Section


class ServeConfig(Section):
    """Engines have ``rollout``'s settings (``max_num_seqs``, ``kv_cache_gib``, ...) and ``cluster``'s resources.

    ``min_replicas`` to ``max_replicas`` engines, so many that each has about ``target_requests`` under way.
    ``max_requests`` under way at a gateway; more are answered 429 at once. ``max_model_len`` is what the model reads by
    default; ``max_new_tokens`` caps a request's ``max_tokens``, ``max_n`` its samples (prompts x n). ``value_batch``
    value requests share a forward pass, waited for ``value_wait_s``. An update of the weights waits
    ``drain_timeout_s`` for responses under way; longer ones go on with the new weights.

    The API key is no setting: it is read from the environment, DVPO_API_KEY."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    model_name: str | None = None
    min_replicas: Positive = 1
    max_replicas: Positive = 1
    target_requests: Positive = 64
    gateways: Positive = 1
    cpus_per_gateway: NonNegativeFloat = 0.25
    value_replicas: Positive = 1
    value_batch: Positive = 32
    value_wait_s: NonNegativeFloat = 0.005
    max_requests: Positive = 256
    max_model_len: Positive | None = None
    max_new_tokens: Positive | None = None
    max_n: Positive = 64
    max_body_kib: Positive = 1024
    request_timeout_s: PositiveFloat = 300.0
    start_timeout_s: PositiveFloat = 600.0
    drain_timeout_s: NonNegativeFloat = 60.0
    follow_every_s: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than min_replicas = {self.min_replicas}")
        return self
