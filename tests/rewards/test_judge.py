"""A model as judge, against an endpoint in this process: what it is asked, how it is read, and how it fails."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from typing import Any

import pytest

from dvpo_service.commands.check_rollouts import check_reward, check_rows
from dvpo_service.config import RewardConfig, load_config, to_yaml
from dvpo_service.config.judge import JudgeConfig
from dvpo_service.data.dataset import Dataset
from dvpo_service.errors import ConfigError
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.combine import combine
from dvpo_service.rewards.judge import JudgePart
from dvpo_service.rewards.scoring import Result
from dvpo_service.types import Message, Prompt
from tests.rewards.fake_judge import fake_judge, question, slowly

CHAT = (Message(role="user", content="2+3="),)
KEY = "sk-hunter2-and-more"


def work(*responses: str) -> Work:
    return Work(list(responses), "5", [0] * len(responses), "sums", {"unit": "apples"}, CHAT)


def config(url: str, **more: Any) -> JudgeConfig:
    given = {"base_url": url, "model": "m", "prompt": "{{ response }}", "retries": 0, "timeout_s": 5} | more
    return JudgeConfig.model_validate(given)


def reward(url: str, **more: Any) -> RewardConfig:
    return RewardConfig.model_validate({"judge": config(url, **more).model_dump()})


def results(url: str, *responses: str, **more: Any) -> list[Result]:
    return JudgePart(config(url, **more)).score([work(*responses)])[0]


def test_it_is_asked_what_the_templates_say() -> None:
    prompt, system = "{{ prompt }} {{ answer }} {{ unit }}: {{ response }} {not: a name}", "Be strict, {{ source }}."
    with fake_judge(lambda body, key: (200, " 0.5\n")) as judge:
        more = {"temperature": 0.2, "max_tokens": 7, "options": {"seed": 3}}
        assert results(judge.url, "6", prompt=prompt, system=system, **more) == [Result(0.5)]
    [body] = judge.asked
    assert body["messages"] == [
        {"role": "system", "content": "Be strict, sums."},
        {"role": "user", "content": "2+3= 5 apples: 6 {not: a name}"},
    ]
    assert [body[k] for k in ("model", "temperature", "max_tokens", "seed")] == ["m", 0.2, 7, 3]


@pytest.mark.parametrize(
    ("how", "reply", "expected"),
    [
        ({}, " 7.5\n", Result(7.5)),
        ({"range": [0, 10]}, "7.5", Result(0.75)),
        ({"read": "regex", "pattern": r"Score: (\S+)"}, "Score: 1? No.\nScore: 3", Result(3.0)),
        ({"read": "json"}, '```json\n{"score": 0.5, "clarity": 2, "why": "x"}\n```', Result(0.5, {"clarity": 2.0})),
        ({"read": "json", "range": [1, 5]}, '{"score": "5"}', Result(1.0)),
    ],
)
def test_a_reply_is_read_as_the_config_says(how: dict[str, Any], reply: str, expected: Result) -> None:
    with fake_judge(lambda body, key: (200, reply)) as judge:
        assert results(judge.url, "r", **how) == [expected]


@pytest.mark.parametrize(
    ("how", "reply", "said"),
    [
        ({}, "I would say\n7 of 10.", "the judge answered 'I would say 7 of 10.', not a number"),
        ({}, "", "the judge answered '', not a number"),
        ({}, "nan", "not a number"),
        ({"range": [0, 10]}, "11", "the judge answered '11', whose score is not from 0 to 10"),
        ({"read": "regex", "pattern": "Score: ([0-9])"}, "Good!", "which reward.judge.pattern does not match"),
        ({"read": "json"}, "{score: 1}", "not a JSON object with a score"),
        ({"read": "json"}, '{"grade": 1}', "not a JSON object with a score"),
        ({"read": "json"}, '{"score": "high"}', "not a number"),
    ],
)
def test_prose_fails_the_sample_and_scores_nothing(how: dict[str, Any], reply: str, said: str) -> None:
    with fake_judge(lambda body, key: (200, reply)) as judge:
        [result] = results(judge.url, "r", **how)
    assert said in str(result.error)
    assert math.isnan(result.value)


def test_an_outage_fails_its_samples_and_never_scores_0() -> None:
    whole = reward("http://127.0.0.1:9/v1")
    groups = [work("a", "b")]
    part = JudgePart(config("http://127.0.0.1:9/v1"))
    [scores] = combine(whole, groups, [{0: r} for r in part.score(groups)], training=True)
    for score in scores:
        assert (math.isnan(score.reward), math.isnan(score.clean)) == (True, True)
        assert "the judge gave no answer: APIConnectionError" in str(score.error)
    with fake_judge(lambda body, key: (200, {"detail": "another kind of endpoint"})) as judge:
        assert "has no choices" in str(results(judge.url, "r")[0].error)


def test_errors_that_may_pass_are_tried_again() -> None:
    with fake_judge(lambda body, key: (503, "busy") if len(judge.asked) == 1 else (200, "1")) as judge:
        assert results(judge.url, "r", retries=1) == [Result(1.0)]
    assert len(judge.asked) == 2
    with fake_judge(lambda body, key: (400, "no such model")) as judge:
        [result] = results(judge.url, "r", retries=3)
    assert (len(judge.asked), "no such model" in str(result.error)) == (1, True), "this one does not pass"


def test_a_slow_judge_costs_what_it_did_not_answer() -> None:
    over = threading.Event()

    def answer(body: dict[str, Any], key: str) -> tuple[int, str]:
        if question(body) == "slow":
            over.wait(60)
        return 200, "1"

    with fake_judge(answer) as judge:
        started = time.perf_counter()
        [quick, slow] = results(judge.url, "quick", "slow", deadline_s=3)
        assert time.perf_counter() - started < 20
        assert quick == Result(1.0)
        assert slow.error == "no answer from the judge within 3 s for all responses"
        assert "APITimeoutError" in str(results(judge.url, "slow", timeout_s=0.2)[0].error)
        over.set()


def test_requests_run_side_by_side_up_to_the_limit() -> None:
    with fake_judge(slowly(0.1, "1")) as judge:
        part = JudgePart(config(judge.url, concurrency=8), workers=2)
        part.score([work(*map(str, range(6))), work(*map(str, range(6, 12)))])
    assert (len(judge.asked), judge.most) == (12, 4), "8 over two workers"


def test_the_same_question_is_asked_once_and_a_failure_again() -> None:
    replies = ["prose", "1", "2", "3"]
    with fake_judge(lambda body, key: (200, replies[len(judge.asked) - 1])) as judge:
        part = JudgePart(config(judge.url, cache_size=1))
        assert [r.error is None for r in part.score([work("a")])[0]] == [False]
        assert [r.value for group in part.score([work("a", "a"), work("a")]) for r in group] == [1.0] * 3
        assert part.score([work("a")])[0] == [Result(1.0)]
        assert len(judge.asked) == 2
        part.score([work("b")])
        part.score([work("a")])
    assert len(judge.asked) == 4, "only the newest reply was kept"


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("THE_JUDGES", KEY)  # a name that does not say what it holds
    with fake_judge(lambda body, key: (401, f"wrong key: {key}")) as judge:
        [result] = results(judge.url, "r", key_env="THE_JUDGES")
        assert "wrong key: Bearer ***" in str(result.error)
        override = json.dumps(config(judge.url, key_env="THE_JUDGES").model_dump(mode="json"))
        whole = load_config("demo", [f"reward.judge={override}"])
        with pytest.raises(ConfigError, match=r"gives no answer: AuthenticationError: .*\*\*\*") as caught:
            check_reward(whole.reward, 0, Prompt(0, CHAT, "5", "t"))
    assert "THE_JUDGES" in to_yaml(whole), "the variable's name stays, so that the config can be used again"
    assert KEY not in str(caught.value) + to_yaml(whole) + str(result.error) + caplog.text
    monkeypatch.delenv("THE_JUDGES")
    with pytest.raises(ConfigError, match="key_env=THE_JUDGES: there is no such environment variable here"):
        JudgePart(config(judge.url, key_env="THE_JUDGES"))


def test_a_key_in_place_of_its_variable_is_refused_and_not_repeated() -> None:
    judge = {"base_url": "http://h/v1", "model": "m", "prompt": "?", "key_env": KEY}
    with pytest.raises(ConfigError, match="name the environment variable that holds the key") as caught:
        load_config("demo", [f"reward.judge={json.dumps(judge)}"])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            (200, "A fine answer."),
            r"'judge m': it fails on .*the judge answered 'A fine answer\.', not a number",
        ),
        (
            (404, "no model m"),
            r"the judge at http://127.* gives no answer: NotFoundError: .*no model m.*; start",
        ),
    ],
)
def test_a_judge_of_no_use_is_found_before_the_run(reply: tuple[int, str], said: str) -> None:
    with fake_judge(lambda body, key: reply) as judge:
        whole = RewardConfig.model_validate({"judge": config(judge.url).model_dump()})
        with pytest.raises(ConfigError, match=said) as caught:
            check_reward(whole, 0, Prompt(0, CHAT, "5", "t"))
    assert "\n" not in str(caught.value)


def test_a_column_that_a_template_names_must_be_there() -> None:
    rows = (Prompt(0, CHAT, "5", "t", row={"unit": 1}),)
    with pytest.raises(ConfigError, match="reward 'judge m': it takes the column 'level', which a:1 has not"):
        check_rows(reward("http://h", prompt="{{ response }} {{ level }}"), [Dataset("t", rows, ("a:1",))])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": "{{ response"}, "not a Jinja template"),
        ({"read": "regex"}, "read=regex needs one"),
        ({"pattern": "(1)"}, "pattern goes with read=regex"),
        ({"read": "regex", "pattern": "1"}, "pattern needs one group"),
        ({"read": "regex", "pattern": "("}, "pattern is no regular expression"),
        ({"range": [1, 1]}, "range is the lowest and the highest score"),
        ({"base_url": "localhost:8000"}, "String should match pattern"),
    ],
)
def test_a_judge_s_config_is_checked(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config("http://h/v1", **more)


def test_what_decides_the_score_is_what_the_run_is() -> None:
    def identity(**more: Any) -> Any:
        return reward("http://h", **more).parts[0].identity

    assert identity() == identity(retries=9, concurrency=1, timeout_s=1)
    assert identity() != identity(prompt="?")
