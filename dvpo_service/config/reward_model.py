"""``reward.model``: a sequence-classification model that gives the score."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dvpo_service.config.base import NonNegative, Positive, PositiveFloat, Section


class RewardModelConfig(Section):
    """A model with a classification head, in workers of its own. The score is the logit of ``label``.

    Attributes:
      path: a Hugging Face folder, on a path that all nodes see, or a hub name.
      chat_template: a Jinja template in place of the tokenizer's own.
      label: which of the model's logits is the score.
      probability: the score is the label's probability instead: a sigmoid of a single logit, a softmax of several.
      batch_size: responses per forward pass.
      max_tokens: prompt and response; a longer one has failed. By default as many as the model reads.
      num_workers: copies of the model.
      cpus, gpus: of each worker; with a GPU (or a share of one) the model is on it.
      deadline_s: for all responses that are scored together.
    """

    path: Annotated[str, Field(min_length=1)]
    chat_template: str | None = None
    label: NonNegative = 0
    probability: bool = False
    batch_size: Positive = 16
    max_tokens: Positive | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_workers: Positive = 1
    cpus: PositiveFloat = 1.0
    gpus: Annotated[float, Field(ge=0, le=1)] = 0.0
    deadline_s: PositiveFloat = 300.0
    trust_remote_code: bool = False

    @field_validator("path")
    @classmethod
    def _home(cls, path: str) -> str:
        return os.path.expanduser(path)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the score, apart from what the folder holds."""
        keys = {"path", "chat_template", "label", "probability", "max_tokens", "dtype"}
        return self.model_dump(mode="json", include=keys)
