"""The row's columns and answers of any kind travel to the reward, and are part of what a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvpo_service.commands.check_rollouts import check_rows
from dvpo_service.config import RewardConfig, load_config
from dvpo_service.data.dataset import load_prompts
from dvpo_service.data.reward_metrics import reward_metrics
from dvpo_service.data.splits import check_demonstrations, load_data
from dvpo_service.errors import ConfigError, DataError
from dvpo_service.types import PartScore, Prompt, Score, answer_text


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def takes_level(response: str, answer: str, level: int) -> float:
    return float(level)


HERE = "tests.data.test_rows:takes_level"


def test_every_column_but_the_prompt_travels(tmp_path: Path) -> None:
    plain = {"prompt": "1+1=", "answer": 2, "level": 3, "data_source": "sums"}
    verl = {
        "prompt": [{"role": "user", "content": "?"}],
        "reward_model": {"ground_truth": ["a", "b"], "style": "rule"},
        "extra_info": {"index": 7},
    }
    school = {"question": "2+2?", "answer": "#### 4", "level": 1}
    data = load_prompts([write(tmp_path / "a.jsonl", plain, verl, school)], name="t")
    assert [p.row for p in data.prompts] == [
        {"answer": 2, "level": 3, "data_source": "sums"},
        {"reward_model": verl["reward_model"], "extra_info": {"index": 7}},
        {"answer": "#### 4", "level": 1},
    ]
    assert [p.answer for p in data.prompts] == ["2", ["a", "b"], "4"]


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["?"], "answer": [[1, 2]], "weight": [0.5], "tests": [[{"input": "1"}]]})
    pq.write_table(table, tmp_path / "a.parquet")
    [prompt] = load_prompts([tmp_path / "a.parquet"], name="t").prompts
    assert (prompt.answer, prompt.row["weight"], prompt.row["tests"]) == ([1, 2], 0.5, [{"input": "1"}])


@pytest.mark.parametrize("answer", [["a", {"b": 1.5}], {"x": None}, [], {}])
def test_answers_may_be_lists_and_objects(tmp_path: Path, answer: Any) -> None:
    [prompt] = load_prompts([write(tmp_path / "a.jsonl", {"prompt": "?", "answer": answer})], name="t").prompts
    assert prompt.answer == answer
    assert json.loads(answer_text(prompt.answer)) == answer


def test_an_answer_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["?"], "answer": pa.array([[b"x"]])}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: `answer` holds a value that JSON does not have"):
        load_prompts([tmp_path / "a.parquet"], name="t")


def test_rows_may_do_without_an_answer_where_that_is_said(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Tell a story."}]
    path = write(
        tmp_path / "a.jsonl", {"prompt": "Tell."}, {"prompt": chat, "mood": "sad"}, {"prompt": "?", "answer": ""}
    )
    data = load_prompts([path], name="t", need_answer=False)
    assert [p.answer for p in data.prompts] == [None] * 3
    assert data.prompts[1].messages == tuple(chat)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row has no answer in text, which model"):
        check_demonstrations(data)
    with pytest.raises(DataError, match="`answer` is missing"):
        load_prompts([path], name="t")
    overrides = [f"data.train_files={path}", "data.val_fraction=0.4", "data.answers=optional"]
    assert len(load_data(load_config("demo", overrides).data).train) == 2


def test_a_missing_column_is_refused_at_start_with_its_place(tmp_path: Path) -> None:
    good = {"prompt": "1+1=", "answer": 2, "level": 3}
    path = write(tmp_path / "a.jsonl", good, {"prompt": "1+2=", "answer": 3, "levle": 1})
    data = load_prompts([path], name="t")
    with pytest.raises(ConfigError) as caught:
        check_rows(RewardConfig(function=HERE), [data])
    assert str(caught.value) == (
        f"reward '{HERE}': it takes the column 'level', which {path}:2 has not; did you mean 'levle'? The columns "
        "there are answer, levle. Mend the data or the reward; a column that rows may lack needs a default"
    )
    check_rows(RewardConfig(function=HERE), [load_prompts([write(tmp_path / "b.jsonl", good)], name="t")])


def test_a_reward_of_its_own_sources_needs_its_columns_there_only(tmp_path: Path) -> None:
    rows = {"prompt": "1", "answer": 1, "level": 1, "data_source": "a"}, {"prompt": "2", "answer": 2}
    data = load_prompts([write(tmp_path / "a.jsonl", *rows)], name="t")
    parts: list[dict[str, Any]] = [{"function": HERE, "sources": ["a"]}, {"function": "exact_match"}]
    check_rows(RewardConfig.model_validate({"rewards": parts}), [data])


def test_a_reward_that_compares_text_refuses_other_answers(tmp_path: Path) -> None:
    data = load_prompts([write(tmp_path / "a.jsonl", {"prompt": "1", "answer": [1]})], name="t")
    with pytest.raises(
        ConfigError, match=r"'gsm8k': it compares with an answer that is text, and that of .*:1 is \[1\]"
    ):
        check_rows(RewardConfig(function="gsm8k"), [data])


def test_the_code_reward_refuses_rows_without_tests(tmp_path: Path) -> None:
    tests = {"inputs": ["1"], "outputs": ["1"]}
    rows = {"prompt": "1", "answer": tests}, {"prompt": "2", "answer": tests | {"outputs": []}}
    data = load_prompts([write(tmp_path / "a.jsonl", *rows)], name="t")
    with pytest.raises(ConfigError, match=r"reward 'code': .*a\.jsonl:2: .* two lists of the same length"):
        check_rows(RewardConfig(function="code"), [data])


def test_metrics_are_means_by_source_and_by_reward() -> None:
    prompts = [Prompt(i, (), "1", source) for i, source in enumerate(["a", "b/c"])]
    parts = [(PartScore("x", 1.0, 2.0),), (PartScore("x", 3.0, 6.0),), (PartScore("x", float("nan"), float("nan")),)]
    scores = [
        [Score(1.0, 1.0, None, {"len": 2.0}, parts[0]), Score(1.0, 1.0, None, {"len": 4.0}, parts[1])],
        [Score(1.0, 1.0, None, {"other": 5.0}, parts[2])],
    ]
    assert reward_metrics(prompts, scores) == {
        "reward/source/a/len": 3.0,
        "reward/source/b/c/other": 5.0,
        "reward/part/x/raw": 2.0,
        "reward/part/x/weighted": 4.0,
        "reward/part/x/failed": 1.0,
    }
