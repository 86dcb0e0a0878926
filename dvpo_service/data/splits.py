"""Load the data that a config names: training prompts and held-out splits, tokenized."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dvpo_service.config import DataConfig, RewardConfig
from dvpo_service.data.dataset import Dataset, load_prompts
from dvpo_service.data.encode import encode_prompts
from dvpo_service.data.split import split_dataset
from dvpo_service.errors import ConfigError, DataError

SHIPPED = "shipped:"


@dataclass(frozen=True)
class Data:
    """Training prompts, and held-out splits by name."""

    train: Dataset
    held_out: dict[str, Dataset]

    def encoded(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
        """Return the data with token ids filled. Raises DataError or ConfigError as ``encode_prompts`` does."""
        return Data(
            encode(config, self.train, tokenizer),
            {name: encode(config, split, tokenizer) for name, split in self.held_out.items()},
        )


def load_data(config: DataConfig) -> Data:
    """Return the data that ``config`` names, without token ids. Raises DataError if a file or row cannot be used."""
    train = _load(config, config.train_files, "train")
    if config.val_fraction is not None:
        # A fixed seed: the same rows are held out for every trainer.seed, so that runs can be compared.
        train, held_out = split_dataset(train, val_fraction=config.val_fraction, seed=0)
        limit = config.val_limit or len(held_out)
        held_out = replace(held_out, prompts=held_out.prompts[:limit], origins=held_out.origins[:limit])
        return Data(train, {"held_out": held_out})
    splits = {
        # Prompts that are also in the training data are left out.
        name: _load(config, files, name, exclude=train.keys(), limit=config.val_limit)
        for name, files in config.val_files.items()
    }
    return Data(train, splits)


def check_sources(config: RewardConfig, train: Dataset) -> None:
    """Raise ConfigError if the config names a source that no training prompt has, or one has no reward."""
    known = sorted({p.source for p in train.prompts})
    named = [(f"reward.noise_by_source.{source}", source) for source in sorted(config.noise_by_source)]
    for part in config.parts:
        named += [(f"the sources of the reward {part.name!r}: {source}", source) for source in part.sources or ()]
    for where, source in named:
        if source not in known:
            raise ConfigError(
                f"{where}: no training prompt has that data_source; "
                f"the data has {', '.join(known[:10])}{' and others' if len(known) > 10 else ''}"
            )
    for source in known:
        if not any(part.weight and part.scores(source) for part in config.parts):
            raise ConfigError(
                f"none of reward.rewards scores the prompts of data_source {source!r}; add one, or leave sources out"
            )


def load_files(config: DataConfig, files: Sequence[str]) -> dict[str, Dataset]:
    """Return all prompts of the files; files of the same name form a split. No prompt is left out."""
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(Path(file.removeprefix(SHIPPED)).stem, []).append(file)
    return {name: _load(config, group, name) for name, group in splits.items()}


def resolve_file(file: str) -> str:
    """Return the path of ``shipped:NAME``, a file of the package; any other path or glob is returned as it is."""
    if not file.startswith(SHIPPED):
        return file
    return str(resources.files("dvpo_service") / "data" / "shipped" / file.removeprefix(SHIPPED))


def load_demonstrations(config: DataConfig, files: list[str]) -> Dataset:
    """Return the demonstrations that a warm start learns from, read like the training data."""
    return _load(config, files, "warmstart")


def check_demonstrations(examples: Dataset) -> None:
    """Raise DataError if a row has no answer to learn from: none, or tests, say, in place of a text."""
    for where, prompt in zip(examples.origins, examples.prompts, strict=True):
        if not isinstance(prompt.answer, str):
            raise DataError(
                f"{where}: the row has no answer in text, which model.warmstart learns to give; name other rows with "
                "model.warmstart.files, or start from model.path"
            )


def encode(config: DataConfig, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return ``data`` with token ids, by the config's settings (see ``encode_prompts``)."""
    return encode_prompts(
        data,
        tokenizer,
        chat_template=config.chat_template,
        max_prompt_tokens=config.max_prompt_tokens,
        on_bad_row=config.on_bad_row,
    )


def _load(
    config: DataConfig,
    files: list[str],
    name: str,
    *,
    exclude: Set[str] | None = None,
    limit: int | None = None,
) -> Dataset:
    return load_prompts(
        [resolve_file(f) for f in files],
        name=name,
        row_format=config.row_format,
        gsm8k_mode=config.gsm8k_mode,
        operators=config.operators,
        max_operands=config.max_operands,
        max_digits=config.max_digits,
        on_bad_row=config.on_bad_row,
        limit=limit,
        exclude=exclude,
        need_answer=config.answers == "required",
    )
