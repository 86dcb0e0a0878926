"""Tables as people have them: columns by value, whole numbers as floats, compressed files, files of one name."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvpo_service.config import DataConfig, load_config
from dvpo_service.data.dataset import load_prompts
from dvpo_service.data.splits import load_data
from dvpo_service.errors import ConfigError, DataError

VERL = {
    "prompt": [{"role": "user", "content": "1+2="}],
    "reward_model": {"ground_truth": "3"},
    "data_source": "sums",
}


def prompts(file: Path) -> list[tuple[str, str]]:
    return [(p.messages[-1]["content"], p.answer) for p in load_prompts([file], name="t").prompts]


def jsonl(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_schema_is_told_by_the_columns_that_have_a_value(tmp_path: Path) -> None:
    mixed = [
        {"prompt": "1+1=", "answer": "2", "reward_model": None, "question": None},
        {**VERL, "answer": None, "question": None},
        {"prompt": None, "reward_model": None, "question": "1+3=?", "answer": "It is 4. #### 4"},
    ]
    assert prompts(jsonl(tmp_path / "mixed.jsonl", *mixed)) == [("1+1=", "2"), ("1+2=", "3"), ("1+3=?", "4")]


def test_whole_numbers_in_a_column_with_a_gap_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "gap.parquet"
    pq.write_table(pa.table({"prompt": ["1+1=", "1/2=", "?"], "answer": [2.0, 0.5, 1e300]}), file)
    assert prompts(file) == [("1+1=", "2"), ("1/2=", "0.5"), ("?", "1e+300")]


def test_reward_models_in_a_map_column_and_as_json_text(tmp_path: Path) -> None:
    turn = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pa.table(
        {
            "prompt": pa.array([VERL["prompt"]], type=turn),
            "reward_model": pa.array([[("ground_truth", "3")]], type=pa.map_(pa.string(), pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "map.parquet")
    assert prompts(tmp_path / "map.parquet") == [("1+2=", "3")]
    text = {**VERL, "reward_model": json.dumps(VERL["reward_model"])}
    assert prompts(jsonl(tmp_path / "text.jsonl", text)) == [("1+2=", "3")]
    with pytest.raises(DataError, match="`reward_model` is of type str, not an object"):
        prompts(jsonl(tmp_path / "bad.jsonl", {**VERL, "reward_model": "{no json"}))


def test_an_empty_system_message_is_left_out(tmp_path: Path) -> None:
    row = {**VERL, "prompt": [{"role": "system", "content": ""}, *VERL["prompt"]]}  # type: ignore[list-item]
    data = load_prompts([jsonl(tmp_path / "system.jsonl", row)], name="t")
    assert [m["role"] for m in data.prompts[0].messages] == ["user"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_compressed_files_are_read(tmp_path: Path, suffix: str) -> None:
    content = b'{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "1+2=", "answer": "3"}\n'
    file = tmp_path / f"rows.jsonl{suffix}"
    if suffix == ".zst":
        with pa.output_stream(str(file), compression="zstd") as stream:
            stream.write(content)
    else:
        file.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}[suffix](content))
    assert prompts(file) == [("1+1=", "2"), ("1+2=", "3")]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"rows\.jsonl\{suffix}: cannot be read"):
        prompts(file)


def test_validation_files_of_one_name_are_two_splits(tmp_path: Path) -> None:
    for folder in ("gsm8k", "math"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "test.jsonl", {"prompt": f"{folder}?", "answer": "1"})
    files = [str(tmp_path / folder / "test.jsonl") for folder in ("gsm8k", "math")]
    config = DataConfig(train_files=["shipped:demo-train.jsonl"], val_files=files)  # type: ignore[arg-type]
    data = load_data(config)
    assert {name: split.prompts[0].messages[-1]["content"] for name, split in data.held_out.items()} == {
        "gsm8k-test": "gsm8k?",
        "math-test": "math?",
    }
    with pytest.raises(ConfigError, match="two files would be the split 'gsm8k-test'; name the splits"):
        load_config("demo", [f"data.val_files=[{files[0]}, {files[0]}]"])


def test_the_limit_holds_for_a_fraction_held_out_too() -> None:
    config = DataConfig(train_files=["shipped:demo-train.jsonl"], val_fraction=0.5, val_limit=7)
    assert len(load_data(config).held_out["held_out"]) == 7
