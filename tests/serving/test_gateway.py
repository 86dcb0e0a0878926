"""The gateway on fake replicas in memory: limits, refusals, ranking, streams that are cut off."""

from __future__ import annotations

import asyncio
import json
import re

from tests.serving.fake_replicas import CHAT, COMPLETIONS, NAME, TURN, VALUES, A, FakePolicy, FakeValues, client, status


def test_what_a_request_leaves_to_vllm_reaches_it() -> None:
    policy = FakePolicy()
    ask = TURN | {"min_p": 0.1, "tools": [{"type": "function"}], "rank_by": "mean", "n": 2}
    asyncio.run(status(client(policy, FakeValues()), CHAT, ask))
    assert policy.seen == [TURN | {"min_p": 0.1, "tools": [{"type": "function"}], "n": 2, "return_token_ids": True}]


def test_a_fault_of_the_servers_is_500_in_openais_form_and_counted() -> None:
    async def scenario() -> None:
        policy = FakePolicy(fault=RuntimeError("secret"))
        c = client(policy)
        c._transport.raise_app_exceptions = False  # type: ignore[attr-defined]
        answer = await c.post(COMPLETIONS, json=A)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        assert "secret" not in answer.text
        assert f'route="{COMPLETIONS}",status="500"' in (await c.get("/metrics")).text

    asyncio.run(scenario())


def test_openai_clients_find_the_model_by_its_id() -> None:
    async def scenario() -> None:
        c = client(FakePolicy(), FakeValues())
        for path in (NAME, NAME.replace("/", "%2F")):
            answer = await c.get(f"/v1/models/{path}")
            assert (answer.status_code, answer.json()["id"]) == (200, NAME)
        answer = await c.get("/v1/models/other/one")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
        code, message = await status(c, VALUES, {"prompt": "a", "response": "b", "model": "other"})
        assert (code, message) == (404, f"the model 'other' does not exist; this server has '{NAME}'")

    asyncio.run(scenario())


def test_head_is_answered_where_get_is_and_errors_have_openais_form() -> None:
    async def scenario() -> None:
        c = client()
        for path in (
            "/",
            "/healthz",
            "/readyz",
            "/metrics",
            "/v1/models",
            f"/v1/models/{NAME}",
            "/docs",
            "/openapi.json",
        ):
            assert (await c.head(path)).status_code == (await c.get(path)).status_code == 200, path
        for method, path, code in (("GET", "/v1/nothing", 404), ("GET", COMPLETIONS, 405)):
            answer = await c.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (code, code)

    asyncio.run(scenario())


def test_docs_and_page_name_nothing_outside_and_nothing_absolute() -> None:
    """So they work without the internet, and behind a proxy's sub-path."""

    async def scenario() -> None:
        c = client()
        docs = (await c.get("/docs")).text
        for asset in re.findall(r'(?:src|href)="([^"]+)"', docs):
            answer = await c.get(f"/{asset}")
            assert (answer.status_code, len(answer.content) > 1000) == (200, True), asset
        assert "url: 'openapi.json'" in docs
        for text in (docs, (await c.get("/")).text):
            assert not re.findall(r'https?://[^"\s]+', text.replace("http://www.w3.org/2000/svg", ""))
            assert not re.findall(r"""(?:fetch|post)\(["']/|(?:src|href|url)[=:] ?["']/""", text)
        assert (await c.get("/openapi.json")).json()["servers"] == [{"url": "."}]

    asyncio.run(scenario())


def test_the_default_length_is_within_the_limit() -> None:
    policy = FakePolicy()
    asyncio.run(status(client(policy, max_new_tokens=50), COMPLETIONS, {"prompt": "a"}))
    assert policy.seen[0]["max_tokens"] == 50


def test_more_than_the_limit_under_way_is_429_and_health_still_answers() -> None:
    async def scenario() -> None:
        policy = FakePolicy()
        policy.hold.clear()
        c = client(policy, max_requests=2)
        held = [asyncio.create_task(status(c, COMPLETIONS, {"prompt": "a"})) for _ in range(2)]
        await asyncio.sleep(0.05)
        answer = await c.post(COMPLETIONS, json={"prompt": "a"})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert (await c.get("/healthz")).status_code == 200
        assert "dvpo_requests_under_way 2.0" in (await c.get("/metrics")).text
        policy.hold.set()
        assert [code for code, _ in await asyncio.gather(*held)] == [200, 200]
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 200, "room again"

    asyncio.run(scenario())


def test_a_stream_counts_as_under_way_until_its_end() -> None:
    async def scenario() -> None:
        c = client(FakePolicy(), max_requests=1)
        for _ in range(3):
            answer = await c.post(COMPLETIONS, json={"prompt": "a", "stream": True})
            assert answer.text == "data: 1\n\ndata: [DONE]\n\n"
        assert "dvpo_requests_under_way 0.0" in (await c.get("/metrics")).text

    asyncio.run(scenario())


def test_a_stream_cut_in_the_middle_says_so_and_one_refused_is_no_stream() -> None:
    async def scenario() -> None:
        c = client(FakePolicy(cut=True))
        answer = await c.post(COMPLETIONS, json={"prompt": "a", "stream": True})
        first, error, done = answer.text.strip().split("\n\n")
        assert first == "data: 1"
        assert "its replica died" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        answer = await c.post(COMPLETIONS, json={"prompt": "a", "stream": True, "bad": True})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no")

    asyncio.run(scenario())


def test_the_key_guards_the_api_and_not_the_health_checks() -> None:
    async def scenario() -> None:
        c = client(key="secret")
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 401
        assert (await status(c, COMPLETIONS, {"prompt": "a"}, authorization="Bearer wrong"))[0] == 401
        assert (await status(c, COMPLETIONS, {"prompt": "a"}, authorization="Bearer secret"))[0] == 200
        assert (await status(c, COMPLETIONS, {"prompt": "a"}, Authorization="bearer  secret"))[0] == 200
        assert (await status(c, COMPLETIONS, {"prompt": "a"}, authorization="Basic secret"))[0] == 401
        answer = await c.get("/v1/models")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert (await c.get("/readyz")).status_code == 200
        assert (await c.get("/")).status_code == 200

    asyncio.run(scenario())


def test_best_of_n_returns_one_choice_a_prompt_and_what_each_was_worth() -> None:
    async def scenario() -> None:
        values = FakeValues()
        c = client(FakePolicy(), values)
        body = (await c.post(COMPLETIONS, json={"prompt": "a", "n": 3, "rank_by": "mean"})).json()
        assert [c["text"] for c in body["choices"]] == ["t2"]
        assert [r["index"] for r in body["ranking"]] == [2, 1, 0]
        assert "token_ids" not in body["choices"][0], "nobody asked for them"
        assert [r["text"] for r in body["ranking"]] == ["t2", "t1", "t0"]
        assert [(r.sampled_ids, r.text, r.ended) for r in values.seen] == [
            ((5, 6, 1), "t0", True),
            ((5, 7, 1), "t1", False),
            ((5, 8, 1), "t2", True),
        ]
        body = (await c.post(COMPLETIONS, json={"prompt": "a", "n": 3, "rank_by": "cvar"})).json()
        assert [c["text"] for c in body["choices"]] == ["t0"]

    asyncio.run(scenario())


def test_without_a_critic_values_are_501_and_completions_work() -> None:
    async def scenario() -> None:
        c = client()
        assert (await status(c, "/v1/values", {"prompt": "a", "response": "b"}))[0] == 501
        assert (await status(c, COMPLETIONS, {"prompt": "a", "rank_by": "mean"}))[0] == 501
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 200

    asyncio.run(scenario())


def test_the_page_is_told_what_readers_must_know() -> None:
    answer = asyncio.run(client(note="29 is 92").get("/readyz"))
    assert (answer.json()["note"], answer.json()["model"]) == ("29 is 92", NAME)


def test_no_replica_is_503_and_not_ready() -> None:
    async def scenario() -> None:
        c = client(FakePolicy(lost=True))
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 503
        answer = await c.get("/readyz")
        assert (answer.status_code, answer.json()["waiting_for"]) == (503, "policy")

    asyncio.run(scenario())
