"""Split one dataset into a training and a validation part."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace

from dvpo_service.data.dataset import Dataset, prompt_key
from dvpo_service.errors import DataError


def split_dataset(dataset: Dataset, *, val_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return the training and the validation part, split by row so that all calculations of one problem stay together.

    Validation prompts that also occur in training are left out.

    Args:
      val_fraction: share of rows, 0 to 1, that go to validation.
      seed: of the shuffle.

    Raises:
      DataError: a part would be empty.
    """
    rows = sorted(set(dataset.origins))
    random.Random(seed).shuffle(rows)
    val_rows = set(rows[: round(val_fraction * len(rows))])
    in_train = [i for i, where in enumerate(dataset.origins) if where not in val_rows]
    train = _pick(dataset, in_train, excluded=0)
    keys = train.keys()
    in_val = [i for i, where in enumerate(dataset.origins) if where in val_rows]
    unseen = [i for i in in_val if prompt_key(dataset.prompts[i]) not in keys]
    val = replace(_pick(dataset, unseen, excluded=len(in_val) - len(unseen)), skipped_by_reason={})  # counted in train
    if not len(train) or not len(val):
        raise DataError(
            f"{dataset.name}: a split of {len(rows)} rows with val_fraction={val_fraction} leaves "
            f"{len(train)} prompts to train and {len(val)} to validate; choose another fraction"
        )
    return train, val


def _pick(dataset: Dataset, positions: Collection[int], excluded: int) -> Dataset:
    prompts = tuple(replace(dataset.prompts[i], index=new) for new, i in enumerate(positions))
    origins = tuple(dataset.origins[i] for i in positions)
    return replace(dataset, prompts=prompts, origins=origins, excluded=excluded)
