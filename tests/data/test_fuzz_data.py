"""Any data file is either a dataset, or an error of one line that starts with the file."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dvpo_service.data.dataset import Dataset, load_prompts
from dvpo_service.data.encode import encode_prompts
from dvpo_service.errors import DataError
from dvpo_service.models.small import character_tokenizer

TOKENIZER = character_tokenizer()


def fuzz(examples: int) -> settings:
    return settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=examples)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(300, 420).map(lambda n: 10**n),  # fits no float
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["\ud800", "a\x00b", "\ufeff", "x" * 100_000, "<eos>", "#### 5"]),
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=6
)
message = st.fixed_dictionaries({}, optional={"role": values, "content": values})
solution = st.from_regex(r"(<<[0-9+*/=. ()-]{1,12}>>){0,3}(#### ?[0-9,.-]{1,5})?", fullmatch=True)
fields = {
    "prompt": values | st.lists(message, max_size=2),
    "answer": values | solution,
    "question": values,
    "reward_model": values | st.fixed_dictionaries({"ground_truth": values}),
    "data_source": values,
}
rows = values | st.fixed_dictionaries({}, optional=fields)
good = st.just({"prompt": "1+1=", "answer": 2})
whole_lines = (rows | good).map(lambda row: json.dumps(row).encode())
lines = st.one_of(
    st.binary(max_size=30),
    whole_lines,
    whole_lines.flatmap(lambda line: st.integers(0, len(line)).map(lambda n: line[:n])),  # truncated
    whole_lines.map(lambda line: codecs.BOM_UTF8 + line),
    whole_lines.map(lambda line: line.decode().encode("utf-16")),
    st.sampled_from([codecs.BOM_UTF8, b"", b"[" * 5000, b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}"]),
)
options = st.fixed_dictionaries(
    {
        "gsm8k_mode": st.sampled_from(["question", "calculation"]),
        "operators": st.sampled_from(["+-", "+-*/"]),
        "max_operands": st.integers(2, 4),
        "on_bad_row": st.sampled_from(["stop", "skip"]),
    }
)


def check(path: Path, given_options: dict[str, Any]) -> None:
    on_bad_row = given_options["on_bad_row"]
    try:
        data = load_prompts([path], name="x", **given_options)
    except DataError as error:
        one_line(error, path)
        return
    whole(data)
    try:
        encoded = encode_prompts(data, TOKENIZER, chat_template=True, max_prompt_tokens=99, on_bad_row=on_bad_row)
    except DataError as error:
        one_line(error, path if on_bad_row == "stop" else Path("x"))
        return
    whole(encoded)
    assert all(0 < len(p.token_ids) <= 99 for p in encoded.prompts)


def whole(data: Dataset) -> None:
    assert [p.index for p in data.prompts] == list(range(len(data)))
    assert data.prompts
    for prompt in data.prompts:
        assert prompt.answer.strip() if isinstance(prompt.answer, str) else prompt.answer is not None
        assert prompt.messages
        json.dumps([prompt.messages, prompt.answer], ensure_ascii=False).encode()


def one_line(error: DataError, where: Path) -> None:
    text = str(error)
    assert text.startswith(str(where))
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    assert text.isprintable()


@fuzz(300)
@given(st.lists(lines, max_size=4), options)
def test_jsonl(tmp_path: Path, content: list[bytes], given_options: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(content))
    check(path, given_options)


# One Arrow type per column, including values that a table can hold but Python cannot.
columns = st.one_of(
    st.lists(st.text(max_size=5), min_size=2, max_size=2).map(pa.array),
    st.just(pa.array([b"\xff", b"a"]).view(pa.string())),  # declared as text, but not UTF-8
    st.just(pa.array([b"\xff", b"a"])),
    st.just(pa.array([2**30, 0], pa.date32())),
    st.just(pa.array([2**62, 0], pa.duration("s"))),
    st.just(pa.array([1, None], pa.timestamp("us", tz="Mars/Base"))),
    st.just(pa.array(["1", None]).dictionary_encode()),
    st.just(pa.nulls(2)),
    st.lists(st.floats() | st.none(), min_size=2, max_size=2).map(lambda v: pa.array(v, pa.float64())),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2).map(pa.array),
    st.just(pa.array([[("role", "user")], None], pa.map_(pa.string(), pa.string()))),
    st.just(pa.array([{"ground_truth": "1"}, None])),
    st.just(pa.array([[{"role": "user", "content": "1+1="}], [{"role": None, "content": "2"}]])),
)
names = st.sampled_from([*fields, "text"])


@fuzz(150)
@given(st.lists(st.tuples(names, columns), max_size=4), options)
def test_parquet_of_any_type(
    tmp_path: Path, content: list[tuple[str, pa.Array]], given_options: dict[str, Any]
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([c for _, c in content], names=[n for n, _ in content]), path)
    check(path, given_options)


@fuzz(100)
@given(st.lists(st.fixed_dictionaries({}, optional=fields) | good, max_size=3), options)
def test_parquet_of_any_rows(tmp_path: Path, content: list[dict[str, Any]], given_options: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    try:
        pq.write_table(pa.Table.from_pylist(content), path)
    except (pa.ArrowException, ValueError, OverflowError):
        assume(False)  # these rows make no table
    check(path, given_options)


@fuzz(200)
@given(st.data(), options)
def test_parquet_damaged(tmp_path: Path, data: st.DataObject, given_options: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"{i}+1=" for i in range(20)], "answer": ["1"] * 20}), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    check(path, given_options)


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "~nobody-of-that-name/a.jsonl", "a\x00b.jsonl", "[.jsonl"])
def test_a_path_that_can_be_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_prompts([name if name.startswith("~") else tmp_path / name], name="x")
    assert "\n" not in str(caught.value)


def test_one_cell_that_python_cannot_hold_costs_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.array([b"1", b"\xff", b"3"]).view(pa.string())
    pq.write_table(pa.table({"prompt": text, "answer": ["1", "2", "3"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet row 2: its text is not UTF-8"):
        load_prompts([path], name="x")
    data = load_prompts([path], name="x", on_bad_row="skip")
    assert [p.answer for p in data.prompts] == ["1", "3"]
    assert data.skipped_by_reason == {"not UTF-8": 1}
