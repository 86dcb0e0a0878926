"""The base class of the configuration's sections, and their number types."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the configuration. It is immutable, and an unknown key is an error rather than ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
