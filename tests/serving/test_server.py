"""``dvpo serve`` with Ray Serve, vLLM, the critic and the ``openai`` package; processes are killed under load."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from openai import APIStatusError, AuthenticationError, OpenAI
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from dvpo_service.models.fixed_sequences import FILE
from dvpo_service.runs.integrity import STATE_FILE
from dvpo_service.serving.values import ValueModel, ValueQuery
from tests.ports import listening
from tests.serving.load import all_back, hammer, processes, settled
from tests.serving.server import ServerProcess, judged_by, make_export

pytestmark = pytest.mark.e2e

MESSAGES: Any = [{"role": "user", "content": "12+7="}]
REPLICAS = 2


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run directory whose finished policy can be replaced by a newer one."""
    folder = tmp_path_factory.mktemp("served") / "run"
    folder.mkdir()
    make_export(folder / "policy", step=10)
    return folder


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[ServerProcess]:
    keys = [f"serve.min_replicas={REPLICAS}", f"serve.max_replicas={REPLICAS}", f"serve.gateways={REPLICAS}"]
    keys += ["serve.follow_every_s=1"]
    with ServerProcess(run_dir, "--follow", *keys, environment={"DVPO_API_KEY": "secret"}) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def values(server: ServerProcess, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/values", json=body, headers={"authorization": "Bearer secret"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_openai_package_chats_completes_and_streams(server: ServerProcess, client: OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, seed=1)
    assert whole.usage
    assert whole.usage.completion_tokens <= 8
    events = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, seed=1, stream=True
    )
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    graded = judged_by(server, "tiny", MESSAGES)
    assert repr(" ".join(text.split())) in str(graded.error), "it is a judge too, though this one answers no number"
    four = client.completions.create(model="tiny", prompt=["1+1=", "2+2="], n=2, max_tokens=4, logprobs=1)
    assert [c.index for c in four.choices] == [0, 1, 2, 3]
    assert four.choices[0].logprobs


def test_ports_beyond_loopback_ask_for_the_cluster_s_token(server: ServerProcess) -> None:
    """Ray Serve's replicas listen on all interfaces and unpickle what they receive, so only their cluster may call."""
    ports = {port for address, port in listening(psutil.Process(server.process.pid)) if address != "127.0.0.1"}
    assert len(ports) >= 2 * REPLICAS, "else the test can go, and the token with it"
    call = ASGIRequest(pickled_request_metadata=b"not even a pickle")
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            ASGIServiceStub(channel).HandleRequest(call, timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_errors_are_those_that_openai_clients_know(server: ServerProcess, client: OpenAI) -> None:
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    for wrong in ({"model": "another"}, {"max_tokens": 1000}, {"temperature": -1.0}, {"n": 1000}):
        ask: Any = {"model": "tiny", "prompt": "1+1=", "max_tokens": 2} | wrong
        with pytest.raises(APIStatusError) as caught:
            client.completions.create(**ask)
        assert caught.value.status_code in (400, 404)
    empty = httpx.post(
        f"{server.url}/v1/values", json={"prompt": "", "response": "1"}, headers={"authorization": "Bearer secret"}
    )
    assert empty.status_code == 400
    assert (
        empty.json()["error"]["message"] == "the prompt is empty: a value needs at least one token before the response"
    )


def test_values_are_the_critics_own(server: ServerProcess, run_dir: Path) -> None:
    states = values(server, prompt="12+7=", response="19", levels="all", alpha=0.25)["states"]
    assert [s["token"] for s in states] == [None, "1", "9"]
    ids = [s["token_id"] for s in states[1:]]
    prompt = (20, 21, 14, 26, 32)
    from dvpo_service.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(run_dir / "policy"))
    prompt = tuple(tokenizer("12+7=")["input_ids"])
    [wanted] = ValueModel(run_dir / "policy" / "critic").values([ValueQuery(prompt, tuple(ids), None, 0.25)])
    for i, state in enumerate(states):
        assert state["quantiles"] == pytest.approx(wanted.quantiles[i], abs=1e-5)
        assert state["cvar"] == pytest.approx(wanted.cvar[i], abs=1e-5)
        assert state["head_disagreement"] == pytest.approx(wanted.head_disagreement[i], abs=1e-5)


@pytest.mark.parametrize("by", ["mean", "cvar", "upper_tail"])
def test_the_best_of_n_is_the_one_that_values_say(server: ServerProcess, client: OpenAI, by: str) -> None:
    ask: Any = {"model": "tiny", "prompt": "12+7=", "n": 6, "max_tokens": 5, "seed": 3}
    ranked = client.completions.create(**ask, extra_body={"rank_by": by, "return_token_ids": True})
    [choice] = ranked.choices
    ranking = ranked.model_extra["ranking"]  # type: ignore[index]
    assert len(ranking) == 6
    assert ranking[0][by] == max(r[by] for r in ranking)
    everything = client.completions.create(**ask, extra_body={"return_token_ids": True})
    best = everything.choices[ranking[0]["index"]]
    assert choice.text == best.text, "the same seed samples the same responses"


def test_a_response_cut_by_a_stop_string_is_worth_what_its_text_is(server: ServerProcess, client: OpenAI) -> None:
    ask: Any = {"model": "tiny", "prompt": "12+7=", "n": 4, "max_tokens": 8, "seed": 3}
    plain = client.completions.create(**ask)
    stop = next(c for choice in plain.choices for c in choice.text[2:] if c.isascii())  # the model is untrained
    ranked = client.completions.create(**ask, stop=stop, extra_body={"rank_by": "mean"})
    ranking = ranked.model_extra["ranking"]  # type: ignore[index]
    cut = [
        r
        for r in ranking
        if r["text"] in {choice.text.split(stop)[0] for choice in plain.choices if stop in choice.text}
    ]
    assert cut, "the stop string cut none"
    for r in cut:
        if "\ufffd" not in r["text"]:  # what is no UTF-8 cannot be asked for
            states = values(server, prompt="12+7=", response=r["text"])["states"]
            assert states[-1]["mean"] == pytest.approx(r["mean"], abs=1e-5)


def test_64_clients_get_answers_and_no_error(server: ServerProcess) -> None:
    rows = hammer(server, 64, lambda: None, seconds=2, until=lambda rows: len(rows) > 128)
    assert len(rows) > 128
    assert {r["status"] for r in rows} == {200}


@pytest.mark.parametrize("victim", ["ServeReplica:dvpo:policy", "VLLM::EngineCore", "ServeReplica:dvpo:values"])
def test_a_process_killed_under_load_costs_no_request(server: ServerProcess, victim: str) -> None:
    def kill() -> None:
        doomed = processes(server, victim)[0]
        killed.append(doomed.pid)
        doomed.send_signal(signal.SIGKILL)

    killed: list[int] = []
    rows = hammer(server, 16, kill, seconds=4, until=lambda rows: len(rows) > 64)
    assert {r["status"] for r in rows} == {200}
    assert len(values(server, prompt="1+1=", response="2")["states"]) == 2, "a value waits for its replica"
    assert killed[0] not in {p.pid for p in all_back(server, victim, 1 if "values" in victim else REPLICAS)}
    server.wait_ready()


def test_gateways_share_a_port_and_one_that_dies_comes_back(server: ServerProcess) -> None:
    """The requests of the dead gateway are lost, as with any HTTP server; a new connection reaches the other one."""
    before = {p.pid: p for p in all_back(server, "ServeReplica:dvpo:gateway")}
    killed = next(iter(before))
    before[killed].send_signal(signal.SIGKILL)
    before[killed].wait(timeout=10)
    for _ in range(20):  # a connection each
        assert httpx.get(f"{server.url}/healthz", timeout=10).text == "ok"
    assert killed not in {p.pid for p in all_back(server, "ServeReplica:dvpo:gateway")}


def test_a_stream_that_has_not_begun_outlives_its_engine(server: ServerProcess) -> None:
    """A stream is whole, or it is cut off after its first event and ends with an error; it never begins with one."""
    streams: list[list[str]] = []
    enough = threading.Event()

    def one(number: int) -> None:
        body = {"prompt": f"{number}+1=", "max_tokens": 48, "ignore_eos": True, "stream": True}
        with httpx.Client(headers={"authorization": "Bearer secret"}, timeout=120) as http:
            while not enough.is_set():
                with http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                    assert answer.status_code == 200
                    streams.append([line for line in answer.iter_lines() if line])

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        running = [pool.submit(one, i) for i in range(24)]
        time.sleep(1.5)
        before = len(streams)
        processes(server, "VLLM::EngineCore")[0].send_signal(signal.SIGKILL)
        until = time.monotonic() + 120
        while len(streams) < before + 96 and time.monotonic() < until:
            time.sleep(0.1)
        enough.set()
        for job in running:
            job.result()
    assert len(streams) >= before + 96
    for events in streams:
        assert '"error"' not in events[0]
        assert events[-1] == "data: [DONE]"
        assert '"error"' in events[-2] or '"finish_reason":"length"' in "".join(events)
    server.wait_ready()


def test_newer_weights_are_served_without_a_failed_request(server: ServerProcess, run_dir: Path) -> None:
    before = values(server, prompt="12+7=", response="19")["states"][0]["mean"]
    all_back(server, "VLLM::EngineCore")  # those killed above too
    settled(server)
    engines = {p.pid for p in all_back(server, "VLLM::EngineCore")}

    def publish() -> None:
        make_export(run_dir / "newer", step=20, seed=5)
        shutil.move(run_dir / "policy", run_dir / "older")
        os.replace(run_dir / "newer", run_dir / "policy")

    rows = hammer(server, 16, publish, seconds=1, until=lambda rows: any(r["version"] == "step-000020" for r in rows))
    assert {r["status"] for r in rows} == {200}
    assert {r["version"] for r in rows} == {"step-000010", "step-000020"}
    assert server.wait_ready()["versions"] == {"policy": "step-000020", "values": "step-000020"}
    assert values(server, prompt="12+7=", response="19")["states"][0]["mean"] != before
    until = time.monotonic() + 120  # printed once every replica has them, also those that were killed above
    while "updated: step-000010 -> step-000020" not in server.output():
        assert time.monotonic() < until, server.output()[-2000:]
        time.sleep(0.5)
    assert {p.pid for p in processes(server, "VLLM::EngineCore")} == engines, "the engines load them in place"


def test_the_new_weights_are_the_new_folders(server: ServerProcess, client: OpenAI, run_dir: Path) -> None:
    """After the update, greedy log-probs equal those of plain transformers on the new folder."""
    import torch

    from dvpo_service.models.load import load_causal_lm

    completion = client.completions.create(
        model="tiny", prompt="12+7=", max_tokens=6, temperature=0, logprobs=1, extra_body={"return_token_ids": True}
    )
    [choice] = completion.choices
    assert choice.model_extra
    assert choice.logprobs
    prompt, response = choice.model_extra["prompt_token_ids"], choice.model_extra["token_ids"]
    with torch.no_grad():
        logits = load_causal_lm(str(run_dir / "policy"))(input_ids=torch.tensor([prompt + response])).logits[0]
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    wanted = rows[torch.arange(len(response)), torch.tensor(response)].tolist()
    assert choice.logprobs.token_logprobs == pytest.approx(wanted, abs=1e-3)


def test_weights_that_are_not_those_exported_are_refused_and_the_old_ones_served_on(
    server: ServerProcess, run_dir: Path
) -> None:
    """The record of the newest checkpoint's export is another model's, as when weights were damaged or exchanged."""
    before = values(server, prompt="12+7=", response="19")["states"][0]["mean"]
    make_export(run_dir / "serving" / "step-000030", step=30, seed=6)
    shutil.copy(run_dir / "policy" / FILE, run_dir / "serving" / "step-000030" / FILE)
    checkpoint = run_dir / "checkpoints" / "step-000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).write_text('{"state": {"step": 30}}')
    until = time.monotonic() + 180
    while "step-000030 is refused, step-000020 is served on" not in " ".join(server.output().split()):
        assert time.monotonic() < until, server.output()[-2000:]
        time.sleep(0.5)
    assert server.wait_ready()["versions"] == {"policy": "step-000020", "values": "step-000020"}
    assert values(server, prompt="12+7=", response="19")["states"][0]["mean"] == before


def test_nothing_is_left_when_the_server_ends(server: ServerProcess) -> None:
    """This test stays the last of the file: it ends the server."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert processes(server, "VLLM::EngineCore")
    said = len(server.output())
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 143
    print(f"ended in {time.monotonic() - began:.1f} s, saying {server.output()[said:]!r}")
    assert server.output()[said:].strip() == "stopped serving"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
