"""Read data files into a ``Dataset`` of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dvpo_service.data import gsm8k
from dvpo_service.data.badrow import BadRow
from dvpo_service.data.formats import Example, parse_row
from dvpo_service.data.readers import expand_files, read_rows
from dvpo_service.data.row_format import AUTO, RowFormat, load_row_format
from dvpo_service.errors import ConfigError, DataError
from dvpo_service.types import Prompt

OnBadRow = Literal["stop", "skip"]


@dataclass(frozen=True)
class Dataset:
    """Prompts with ``prompts[i].index == i``; ``origins[i]`` names the file and row that prompt ``i`` was made from."""

    name: str
    prompts: tuple[Prompt, ...]
    origins: tuple[str, ...]
    skipped_by_reason: Mapping[str, int] = field(default_factory=dict)  # number of bad rows
    excluded: int = 0  # rows (or calculations) left out because another split has their prompt

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def skipped(self) -> int:
        """The number of bad rows that were skipped."""
        return sum(self.skipped_by_reason.values())

    @property
    def left_out(self) -> str:
        """What was left out and why, in words; empty where nothing was."""
        bad = f"{self.skipped} bad rows skipped" if self.skipped else ""
        known = f"{self.excluded} also in the training data" if self.excluded else ""
        return ", ".join(filter(None, (bad, known)))

    def keys(self) -> frozenset[str]:
        """Return the prompts' texts, which another split's ``load_prompts`` takes as ``exclude``."""
        return frozenset(prompt_key(p) for p in self.prompts)


def prompt_key(prompt: Prompt | Example) -> str:
    """Return the text by which two prompts count as the same."""
    return "\n".join(message["content"] for message in prompt.messages)


def load_prompts(
    files: Sequence[str | Path],
    *,
    name: str,
    row_format: str = AUTO,
    gsm8k_mode: gsm8k.Mode = "question",
    operators: str = "+-",
    max_operands: int = 2,
    max_digits: int = 4,
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
    exclude: Set[str] | None = None,
    need_answer: bool = True,
) -> Dataset:
    """Return the prompts of the files, in file order.

    GSM8K calculations are deduplicated. In other modes a repeated row is kept, as it may be repeated on purpose.

    Args:
      files: paths or globs.
      name: the dataset's name, and the source of prompts whose row names none.
      row_format: auto, or the user's own format of rows (see ``row_format.load_row_format``).
      operators, max_operands, max_digits: which GSM8K calculations to take (see ``gsm8k.Options``).
      on_bad_row: stop at the first bad row, or skip bad rows and count them.
      limit: the greatest number of prompts to return; None for all.
      exclude: prompts whose ``prompt_key`` is in this set are left out.
      need_answer: a row without an answer is a bad one.

    Raises:
      DataError: a file cannot be used, a row is bad under ``stop``, or no prompt is left.
      ConfigError: the limit, the row format or an option is wrong.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit of prompts for {name!r} is {limit}; set at least 1, or null for all")
    options = gsm8k.Options(gsm8k_mode, operators, max_operands, max_digits)
    taken = set(exclude or ())
    kept: list[tuple[str, Example]] = []
    bad = BadRows(on_bad_row)
    excluded = 0
    paths = expand_files(files)
    for where, example in _examples(paths, name, load_row_format(row_format), options, bad, need_answer):
        key = prompt_key(example)
        if key in taken:
            excluded += exclude is not None and key in exclude
            continue
        if gsm8k_mode == "calculation":
            taken.add(key)
        kept.append((where, example))
        if len(kept) == limit:
            break
    if not kept:
        why = f"; {bad.total} bad rows skipped {dict(bad.counts)}" if bad.total else ""
        why += f"; {excluded} left out because they are in another split" if excluded else ""
        raise DataError(f"{', '.join(map(str, paths))}: no prompts for {name!r}{why}; check the files")
    prompts = tuple(Prompt(i, ex.messages, ex.answer, ex.source, row=ex.row) for i, (_, ex) in enumerate(kept))
    return Dataset(name, prompts, tuple(where for where, _ in kept), bad.counts, excluded)


def _examples(
    paths: list[Path], name: str, convert: RowFormat, options: gsm8k.Options, bad: BadRows, need_answer: bool
) -> Iterator[tuple[str, Example]]:
    for path in paths:
        rows = 0
        for where, row in read_rows(path):
            rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                examples = [
                    example
                    for known in convert(row)
                    for example in parse_row(known, source=name, options=options, need_answer=need_answer)
                ]
            except BadRow as problem:
                bad.add(where, problem)
                continue
            yield from ((where, example) for example in examples)
        if not rows:
            raise DataError(f"{path}: the file is empty; it needs at least one row")


class BadRows:
    """Raises at the first bad row (``stop``), or counts bad rows by reason (``skip``)."""

    def __init__(self, on_bad_row: OnBadRow, counts: Mapping[str, int] | None = None) -> None:
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter(counts or {})

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, where: str, problem: BadRow) -> None:
        """Count a bad row; raise ``DataError`` under ``stop``. ``where`` is its file and line."""
        if self.on_bad_row == "stop":
            raise DataError(
                f"{where}: {problem.what}. Mend the row, or pass over such rows with data.on_bad_row=skip"
            ) from problem
        self.counts[problem.reason] += 1
