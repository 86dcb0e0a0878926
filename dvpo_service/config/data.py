"""``data``: the prompts to train and evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from dvpo_service.config.base import Positive, Section
from dvpo_service.registry.plugins import is_reference


def _is_row_format(name: str) -> str:
    if name != "auto" and not is_reference(name):
        raise ValueError("use auto, or module:name (data.row_format)")
    return name


def _splits_of(files: list[Any]) -> dict[str, list[Any]]:
    """Return a split for each file, named by the file; by its folder too where two files have one name."""
    paths = [Path(str(file)) for file in files]
    names = [path.stem for path in paths]
    named = [
        f"{path.parent.name}-{name}" if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    ]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(f"two files would be the split {twice[0]!r}; name the splits: {{name: file, other: file}}")
    return {name: [file] for name, file in zip(named, files, strict=True)}


class DataConfig(Section):
    """The prompts. Files are JSONL or Parquet; ``shipped:NAME`` is a file of the package.

    Attributes:
      val_files: files to evaluate on, by split name; a bare path is a split named after the file.
      val_fraction: instead of ``val_files``, the share of training rows held out as the split ``held_out``.
      row_format: auto, or ``module:name`` of a function that turns a row into rows in a known format
        (docs/extending.md).
      gsm8k_mode: whether a GSM8K row gives its question, or the calculations in its solution; ``operators``,
        ``max_operands`` and ``max_digits`` choose among the calculations.
      val_limit: prompts per validation split; null for all.
      answers: required, or optional where rows may have none, as for a judge or a reward model.
    """

    train_files: list[str] = Field(min_length=1)
    val_files: dict[str, list[str]] = Field(default_factory=dict)
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    row_format: Annotated[str, AfterValidator(_is_row_format)] = "auto"
    gsm8k_mode: Literal["question", "calculation"] = "question"
    operators: str = Field("+-", pattern=r"^[-+*/]+$")
    max_operands: Annotated[int, Field(ge=2)] = 2
    max_digits: Positive = 4
    chat_template: bool = True
    max_prompt_tokens: Positive = 64
    on_bad_row: Literal["stop", "skip"] = "stop"
    val_limit: Positive | None = None
    answers: Literal["required", "optional"] = "required"

    @field_validator("train_files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("val_files", mode="before")
    @classmethod
    def _named_splits(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            return _splits_of([value] if isinstance(value, str) else value)
        if isinstance(value, dict):
            return {k: [v] if isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _something_held_out(self) -> Self:
        if bool(self.val_files) == (self.val_fraction is not None):
            raise ValueError(
                "give exactly one of val_files (files to evaluate on) and val_fraction (of train_files); "
                "null clears the other"
            )
        return self
