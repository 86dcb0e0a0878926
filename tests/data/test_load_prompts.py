import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvpo_service.data.dataset import load_prompts
from dvpo_service.errors import ConfigError, DataError

GOOD = b'{"prompt": "1+1=", "answer": "2"}\n'
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0},
}


def write(path, *rows):
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return path


def error_of(*files, **options):
    with pytest.raises(DataError) as caught:
        load_prompts(files, name="train", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, b"\n", {"prompt": "2+2=", "answer": 4, "data_source": "sums"})
    data = load_prompts([path], name="train")
    assert [p.index for p in data.prompts] == [0, 1]
    assert data.prompts[0].messages == ({"role": "user", "content": "1+1="},)
    assert [(p.answer, p.source) for p in data.prompts] == [("2", "train"), ("4", "sums")]
    assert data.origins == (f"{path}:1", f"{path}:3")
    assert data.skipped == 0
    assert data.keys() == {"1+1=", "2+2="}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_verl_rows(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, VERL)
    else:
        pq.write_table(pa.Table.from_pylist([VERL]), path)
    (prompt,) = load_prompts([path], name="train").prompts
    assert prompt.messages == tuple(VERL["prompt"])
    assert (prompt.answer, prompt.source) == ("2", "openai/gsm8k")


def test_parquet_errors_name_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["1+1=", "2+2="], "answer": ["2", None]}), path)
    assert error_of(path).startswith(f"{path} row 2: `answer` is missing.")
    broken = write(tmp_path / "b.parquet", b"not parquet at all")
    assert error_of(broken).startswith(f"{broken}: not readable as Parquet after row 0: ")


def test_globs_are_sorted_and_files_taken_once(tmp_path):
    b = write(tmp_path / "b.jsonl", {"prompt": "b", "answer": 1})
    write(tmp_path / "a.jsonl", {"prompt": "a", "answer": 1})
    data = load_prompts([tmp_path / "*.jsonl", b], name="train")
    assert [p.messages[0]["content"] for p in data.prompts] == ["a", "b"]


def test_limit_and_exclude(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i), "answer": i} for i in range(9)), b"{broken\n")
    data = load_prompts([path], name="train", limit=3, exclude={"1"})
    assert [p.answer for p in data.prompts] == ["0", "2", "3"]
    assert [p.index for p in data.prompts] == [0, 1, 2]
    assert data.excluded == 1
    with pytest.raises(ConfigError, match="limit of prompts for 'train' is 0"):
        load_prompts([path], name="train", limit=0)


def test_missing_files(tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD)
    missing = tmp_path / "trian.jsonl"
    assert error_of(missing) == f"{missing}: data file not found; did you mean {path}?"
    nowhere = tmp_path / "no" / "train.jsonl"
    assert error_of(nowhere) == f"{nowhere}: data file not found, nor its folder {tmp_path / 'no'}; check the path"
    assert "no file matches this pattern" in error_of(tmp_path / "*.parquet")
    assert "this is a folder; name its files" in error_of(tmp_path)
    assert "no data files are given" in error_of()
    text = write(tmp_path / "a.txt", GOOD)
    assert (
        error_of(text)
        == f"{text}: unknown file type '.txt'; accepted: .jsonl, .parquet, and .jsonl compressed as .gz, .zst, .bz2"
    )


def test_empty(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\n \n")
    assert error_of(path) == f"{path}: the file is empty; it needs at least one row"
    path = write(tmp_path / "b.jsonl", GOOD)
    assert "no prompts for 'train'; 1 left out because they are in another split" in error_of(path, exclude={"1+1="})
    path = write(tmp_path / "c.jsonl", b"{\n", b"[]\n")
    assert "no prompts for 'train'; 2 bad rows skipped {'malformed JSON': 1, 'wrong type': 1}" in error_of(
        path, on_bad_row="skip"
    )


BAD = [
    (b'{"prompt": "1",\n', "malformed JSON", "malformed JSON: Expecting property name"),
    (b"[" * 200_000 + b"\n", "malformed JSON", "malformed JSON: "),
    (b'{"prompt": "\xff", "answer": 1}\n', "not UTF-8", "byte 13 of the line is not UTF-8"),
    (b'{"prompt": "\\ud800", "answer": 1}\n', "not UTF-8", "`prompt` has a lone surrogate at character 0"),
    ([1], "wrong type", "the row is of type list, not an object"),
    ({"prompt": 3, "answer": 1}, "wrong type", "`prompt` is of type int, not text"),
    ({"prompt": "1"}, "missing answer", "`answer` is missing"),
    ({"prompt": "1", "answer": " "}, "missing answer", "`answer` is empty"),
    ({"prompt": "1", "answer": True}, "wrong type", "`answer` is of type bool, not text"),
    (b'{"prompt": "1", "answer": NaN}\n', "wrong type", "`answer` is nan, not a finite number"),
    ({"prompt": " ", "answer": 1}, "empty prompt", "`prompt` is empty"),
    (
        {"prompt": VERL["prompt"], "answer": 1},
        "missing answer",
        "`prompt` is a list of messages but `reward_model` is missing",
    ),
    (VERL | {"prompt": []}, "empty prompt", "`prompt` has no messages"),
    (VERL | {"prompt": "1"}, "wrong type", "`prompt` is of type str, not a list of chat messages"),
    (VERL | {"prompt": [{"role": "user"}]}, "wrong type", "`prompt[0].content` is missing, not text"),
    (VERL | {"reward_model": {}}, "missing answer", "`reward_model.ground_truth` is missing"),
    (VERL | {"reward_model": 1}, "wrong type", "`reward_model` is of type int, not an object"),
    ({"question": "1?", "answer": "one"}, "missing answer", "`answer` does not end in '#### N' but in 'one'"),
    (
        {"text": "1"},
        "unknown schema",
        "unknown row schema with keys 'text'; accepted: {prompt: text, answer}, {",
    ),
]


@pytest.mark.parametrize(("row", "reason", "what"), BAD, ids=[what for _, _, what in BAD])
def test_bad_row_stops_or_is_counted(tmp_path, row, reason, what):
    path = write(tmp_path / "a.jsonl", GOOD, row, GOOD)
    message = error_of(path)
    assert message.startswith(f"{path}:2: {what}")
    assert message.endswith("data.on_bad_row=skip")
    data = load_prompts([path], name="train", on_bad_row="skip")
    assert len(data) == 2
    assert data.skipped_by_reason == {reason: 1}
    assert data.origins == (f"{path}:1", f"{path}:3")
