"""``serve``: how a trained policy and its value distributions are served."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from dvpo_service.config.base import NonNegativeFloat, Positive, PositiveFloat, Section


class ServeConfig(Section):
    """The HTTP server.

    Engines take the settings in ``rollout`` (``max_num_seqs``, ``kv_cache_gib``, ...) and the resources in ``cluster``.
    The API key is not a setting: it is read from the environment variable DVPO_API_KEY.

    Attributes:
      note: what readers of the model's responses must know; the page and the model card show it.
      min_replicas, max_replicas: the range for the number of engines.
      target_requests: requests under way per engine that scaling aims at.
      max_requests: requests under way at a gateway; further ones are answered 429 at once.
      max_model_len: tokens of prompt and response; by default as many as the model takes.
      max_new_tokens: upper bound of a request's ``max_tokens``.
      max_n: samples per request (prompts x n).
      value_batch: value requests that share a forward pass; it waits for them for ``value_wait_s``.
      drain_timeout_s: how long an update of the weights waits for responses under way; longer responses go on with the
        new weights.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    model_name: str | None = None
    note: str | None = None
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
