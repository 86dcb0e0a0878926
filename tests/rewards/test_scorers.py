import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo_service.rewards import exact_match, gsm8k, math_verify


@pytest.mark.parametrize(("response", "expected"), [("72", 1.0), (" 72\n", 1.0), ("72.", 0.0), ("", 0.0)])
def test_exact_match(response, expected):
    assert exact_match.score(response, "72 ") == expected


def test_exact_match_extract():
    assert exact_match.extract(" 72\n") == "72"
    assert exact_match.extract("  ") is None


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("#### 72", "72"),
        ("She has 3.\n#### 1,300.", "1300"),
        ("#### 18 of 20", "18"),
        ("#### 5\n#### 6", "6"),
        ("7 #### none", None),
        ("It is $1,234.50.", "1234.5"),
        ("It costs -$5", "-5"),
        ("48-24", "24"),
        ("x = -24", "-24"),
        ("x = −24", "-24"),
        ("1,2", "2"),
        ("1,2345", "2345"),
        (".50", "0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("1" * 40 + ".0", "1" * 40),
        ("no number", None),
        ("", None),
    ],
)
def test_gsm8k_number(response, number):
    assert gsm8k.extract(response) == number
    assert gsm8k.score(response, "#### 72") == float(number == "72")
    if number is not None:
        assert gsm8k.score(response, number) == 1.0


def test_gsm8k_compares_values():
    assert gsm8k.score("so 1,300.00", "#### 1300") == 1.0
    with pytest.raises(ValueError, match="the answer 'abc' has no number"):
        gsm8k.score("3", "abc")


@given(st.text())
def test_gsm8k_takes_any_text(response):
    assert gsm8k.score(response, "1") in (0.0, 1.0)
    assert gsm8k.extract(gsm8k.extract(response) or "") == gsm8k.extract(response)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", "1/2", 1.0),
        ("the answer is 0.5", r"\frac{1}{2}", 1.0),
        ("$2x + x$", "$3x$", 1.0),
        ("7", "8", 0.0),
        ("", "8", 0.0),
    ],
)
def test_math_verify(response, answer, expected):
    assert math_verify.score(response, answer) == expected


def test_math_verify_extract():
    assert math_verify.extract(r"so $x$ is \boxed{ 72 }") == "72"
    assert math_verify.extract("") is None


def test_math_verify_works_in_a_thread_and_says_nothing(caplog):
    results = []
    thread = threading.Thread(target=lambda: results.append(math_verify.score("it is 72", "72")))
    thread.start()
    thread.join(timeout=60)
    assert results == [1.0]
    assert not caplog.records


def test_math_verify_refuses_an_answer_without_meaning():
    with pytest.raises(ValueError, match="cannot parse the answer ''"):
        math_verify.score("3", "")
