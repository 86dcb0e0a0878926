import pickle

import pytest

from dvpo_service.errors import ConfigError
from dvpo_service.rewards.scoring import OF_TEXT, resolve

MODULE = """
def length(response, answer):
    return float(len(response))
length.extract = lambda response: response[:1]
def one(text):
    return 1.0
number = 3
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import no_such_thing\n")
    (tmp_path / "my_syntax.py").write_text("def\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", OF_TEXT)
def test_built_in(name):
    scorer = resolve(name)
    assert scorer("72", "72") == 1.0
    assert scorer("85", "72") == 0.0
    assert scorer.extract("72") == "72"
    assert pickle.loads(pickle.dumps(scorer)) == scorer  # noqa: S301 - Ray sends it this way


def test_own_function():
    scorer = resolve("my_rewards:length")
    assert scorer("abc", "") == 3.0
    assert scorer.extract("abc") == "a"
    assert resolve("math:hypot").extract(" a ") == "a"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gsm8",
            r"reward 'gsm8': did you mean gsm8k\? use one of exact_match, gsm8k, math_verify, share_right, ",
        ),
        ("", r"reward '': use one of"),
        (":f", r"reward ':f': use one of"),
        (
            "no_such:f",
            r"module 'no_such' cannot be imported \(ModuleNotFoundError: .*\); is it on PYTHONPATH\?",
        ),
        ("my_broken:f", r"module 'my_broken' cannot be imported \(ModuleNotFoundError: .*no_such_thing"),
        ("my_syntax:f", r"module 'my_syntax' cannot be imported \(SyntaxError"),
        ("my_rewards:lenght", r"has no function 'lenght'; did you mean my_rewards:length\?"),
        ("my_rewards:zzz", r"has no function 'zzz'; define it in .*my_rewards\.py"),
        ("my_rewards:number", r"reward 'my_rewards:number': it is of type int, not a function"),
        ("my_rewards:one", r"reward 'my_rewards:one': its arguments \(text\) fit nothing; take \(response, answer\), "),
    ],
)
def test_what_cannot_be_resolved(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
