import os
from pathlib import Path

import pytest

from dvpo_service.data import gsm8k
from dvpo_service.data.badrow import BadRow
from dvpo_service.data.dataset import load_prompts
from dvpo_service.data.split import split_dataset
from dvpo_service.errors import ConfigError, DataError
from tests.builders import needs

SAMPLE = Path(__file__).parent / "gsm8k_sample.jsonl"
SHARED = Path(os.environ.get("DVPO_SHARED", Path(__file__).parents[2].parent / "shared"))
REAL = SHARED / "data" / "gsm8k"
real = needs(None if REAL.is_dir() else f"{REAL} is not there")


def texts(data):
    return [p.messages[0]["content"] for p in data.prompts]


@pytest.mark.parametrize(
    ("annotation", "operators", "expected"),
    [
        ("48/2=24", "/", ("48/2=", "24")),
        ("48/2=24", "+-", None),
        ("05+7=12", "+-", ("5+7=", "12")),
        ("18+9=27.00", "+-", ("18+9=", "27")),
        ("5-8=-3", "+-", ("5-8=", "-3")),
        ("8+9=18", "+-", None),  # wrong
        (".5+.5=1", "+-", None),
        ("-20+10=-10", "+-", None),
        ("7/2=3.5", "/", None),
        ("5/0=0", "/", None),
        ("1+2+3=6", "+-", None),  # three operands
        ("20000+1=20001", "+-", None),  # five digits
        ("12 + 3 = 15", "+-", ("12+3=", "15")),
        ("7=7", "+-", None),
        ("3**2=9", "*", None),
        ("1+1=", "+-", None),
        ("1+1=-", "+-", None),
        ("1+1=1+1", "+-", None),
        ("١+1=2", "+-", None),
    ],
)
def test_calculation(annotation, operators, expected):
    kept = gsm8k.calculations(f"so <<{annotation}>>that", gsm8k.Options("calculation", operators))
    assert kept == ([expected] if expected else [])


def test_precedence_and_more_operands():
    options = gsm8k.Options("calculation", "+-*/", max_operands=4)
    assert gsm8k.calculations("<<2+3*4=14>><<8-4-2=2>><<1/3*3=1>>", options) == [
        ("2+3*4=", "14"),
        ("8-4-2=", "2"),
        ("1/3*3=", "1"),
    ]


def test_final_answer():
    assert gsm8k.final_answer("so\n#### 1,300") == "1300"
    for solution in ("so 3", "#### three", "####", "#### 3 apples"):
        with pytest.raises(BadRow, match="does not end in '#### N'"):
            gsm8k.final_answer(solution)


@pytest.mark.parametrize("options", [{"operators": ""}, {"operators": "+^"}, {"max_operands": 1}])
def test_options_are_checked(options):
    with pytest.raises(ConfigError, match=r"data\.(operators|max_operands)"):
        load_prompts([SAMPLE], name="x", **options)


def test_sample_questions():
    data = load_prompts([SAMPLE], name="train")
    assert len(data) == 20
    assert data.prompts[2].answer == "1300"
    assert data.prompts[0].source == "gsm8k"


def test_sample_calculations_are_deduplicated():
    data = load_prompts([SAMPLE], name="train", gsm8k_mode="calculation")
    assert texts(data) == [
        *("14+9=", "23-6=", "1250+50=", "5-8=", "30-12=", "18+5=", "100-50=", "18+9=", "5+7="),
        *("60-9=", "11+23=", "40-17=", "48-5=", "31+44="),
    ]
    assert data.origins[:2] == (f"{SAMPLE}:1", f"{SAMPLE}:1")
    assert [p.index for p in data.prompts] == list(range(14))


def test_val_prompts_that_train_has_are_dropped():
    train = load_prompts([SAMPLE], name="train", gsm8k_mode="calculation", limit=5)
    val = load_prompts([SAMPLE], name="val", gsm8k_mode="calculation", exclude=train.keys())
    assert not set(texts(val)) & set(texts(train))
    assert len(val) == 9
    assert val.excluded == 6  # 14+9 is in two problems


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_a_problem_together(seed):
    data = load_prompts([SAMPLE], name="all", gsm8k_mode="calculation")
    train, val = split_dataset(data, val_fraction=0.3, seed=seed)
    assert not set(train.origins) & set(val.origins)
    assert not train.keys() & val.keys()
    assert len(train) + len(val) == len(data)
    assert [p.index for p in val.prompts] == list(range(len(val)))
    assert split_dataset(data, val_fraction=0.3, seed=seed) == (train, val)


def test_split_drops_repeated_prompts_and_refuses_an_empty_part(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1", "answer": 1}\n' * 4 + '{"prompt": "2", "answer": 1}\n' * 4)
    data = load_prompts([path], name="all")
    with pytest.raises(DataError, match=r"val_fraction=0\.01 leaves 8 prompts to train and 0 to validate"):
        split_dataset(data, val_fraction=0.01, seed=0)
    for seed in range(20):
        try:
            train, val = split_dataset(data, val_fraction=0.5, seed=seed)
        except DataError:
            continue
        assert not train.keys() & val.keys()


@real
def test_real_questions():
    assert len(load_prompts([REAL / "train.jsonl"], name="train")) == 7473
    assert len(load_prompts([REAL / "test.jsonl"], name="val")) == 1319


@real
def test_real_calculations():
    train = load_prompts([REAL / "train.jsonl"], name="train", gsm8k_mode="calculation")
    val = load_prompts([REAL / "test.jsonl"], name="val", gsm8k_mode="calculation", exclude=train.keys())
    assert (len(train), len(val)) == (3757, 424)
    assert len(train.keys()) == 3757
    assert not train.keys() & val.keys()
    for prompt in (*train.prompts, *val.prompts):
        assert int(prompt.answer) == eval(prompt.messages[0]["content"].rstrip("="))  # noqa: S307
