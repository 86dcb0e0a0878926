"""``dvpo_check.json``: what an export records is what its folder computes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dvpo_service.errors import CheckpointError
from dvpo_service.models.fixed_sequences import FILE, FixedSequences, bound, record, recorded
from dvpo_service.models.load import load_causal_lm, load_tokenizer
from dvpo_service.models.small import save_small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    save_small_model(folder, hidden_size=32, num_layers=2, num_heads=1, max_positions=16, seed=0)
    record(load_causal_lm(str(folder)), load_tokenizer(str(folder)), folder)
    return folder


def test_the_record_is_the_folders_own(folder: Path) -> None:
    found = recorded(folder)
    assert found
    assert len(found.token_ids) == 4
    assert max(map(len, found.token_ids)) == 16, "no longer than the model reads"
    lm = load_causal_lm(str(folder))
    import torch

    for ids, wanted in zip(found.token_ids, found.log_probs, strict=True):
        with torch.no_grad():
            scores = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[operator]
        assert [float(scores[i, token]) for i, token in enumerate(ids[1:])] == pytest.approx(wanted, abs=1e-5)


def test_other_weights_are_beyond_the_bound(folder: Path, tmp_path: Path) -> None:
    save_small_model(tmp_path, hidden_size=32, num_layers=2, num_heads=1, max_positions=16, seed=1)
    record(load_causal_lm(str(tmp_path)), load_tokenizer(str(tmp_path)), tmp_path)
    ours, theirs = recorded(folder), recorded(tmp_path)
    assert ours
    assert theirs
    assert ours.difference(ours.log_probs) == 0
    assert ours.difference(theirs.log_probs) > bound("float32")


def test_a_log_prob_that_is_no_number_differs_beyond_every_bound() -> None:
    fixed = FixedSequences([[1, 2, 3]], [[-1.0, -2.0]])
    assert fixed.difference([[-1.0, float("nan")]]) == math.inf
    assert fixed.cut(2) == FixedSequences([[1, 2]], [[-1.0]])


def test_no_file_is_none_and_a_damaged_one_is_named(folder: Path, tmp_path: Path) -> None:
    assert recorded(tmp_path) is None
    for text in ("", "[]", '{"token_ids": [[1, 2]]}', json.dumps({"token_ids": [[1, 2]], "log_probs": [[]]})):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(CheckpointError, match=FILE):
            recorded(tmp_path)
