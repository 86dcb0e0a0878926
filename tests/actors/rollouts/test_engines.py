"""The pool of engines on engines without a model: order, faults, weights. Real Ray actors, no vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ray
import torch
from torch import Tensor

from actors.cluster.connect import connected
from actors.cluster.placement import Placement, plan_bundles
from actors.cluster.pool import PoolError, RestartBudgetExhausted
from actors.rollouts.engines import EnginePool, split
from actors.weights.check import EngineCheck
from actors.weights.sync import SyncedEngines
from actors.weights.transfer import EngineClient, weight_backend
from dvpo_service.config import Config
from dvpo_service.errors import ConfigError, EngineMismatch
from dvpo_service.types import Prompt, Rollouts, Sample, Sampling
from tests.builders import make_config

pytestmark = pytest.mark.e2e

SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=4)
PROMPTS = [Prompt(i, ({"role": "user", "content": "?"},), "1", "t", (5, 6)) for i in range(40)]


def fake_config(max_restarts: int = 20, **rollout: Any) -> Config:
    settings = {"engine": "tests.actors.rollouts.fake_engine:FakeEngine", "num_engines": 2, "prompts_per_step": 4}
    settings |= {"n": 4, "max_new_tokens": 8, "generate_timeout_s": 4.0, "heartbeat_s": 0.2, "heartbeat_timeout_s": 2.0}
    cluster = {"restart_backoff_s": 0.1, "max_restarts": max_restarts, "num_cpus": 8}
    return make_config("model", rollout=settings | rollout, cluster=cluster)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connected(fake_config()):
        yield


class Running:
    """A pool of fake engines, with weights that are a number, and the notes that it gives."""

    def __init__(self, folder: Path, stack: ExitStack, **settings: Any):
        self.folder, self.notes = folder, list[str]()
        config = fake_config(**settings)
        bundles = [b for b in plan_bundles(config) if b.pool == "rollout"]
        placement = Placement(bundles, timeout_s=60)
        stack.callback(placement.release)
        self.pool = EnginePool.spawn(config, str(folder), weight_backend(config), placement, self.notes.append)
        stack.callback(self.pool.shutdown)
        self.sent: list[list[int]] = []
        self.scored = 0
        self.policy_logprob = -1.0  # of any token; the fake engine's is -1
        check = EngineCheck(config, PROMPTS, self.score)
        self.engines = SyncedEngines(config, self.pool, weight_backend(config), self.send, check)

    def start(self) -> Running:
        self.pool.supervisor.start()
        self.pool.supervisor.wait_started()
        self.engines.push(0)
        return self

    def send(self, client: EngineClient, backend: str, timeout_s: float) -> dict[int, str]:
        client.start_weight_update()
        client.update_weights(["weights"])
        client.finish_weight_update()
        self.sent.append(sorted(client.engines))
        return client.lost

    def score(self, rollouts: Rollouts) -> Tensor:
        self.scored += 1
        return torch.full_like(rollouts.rollout_logprobs, self.policy_logprob)

    def ask(self, fault: str) -> None:
        (self.folder / fault).touch()

    def generate(self, step: int = 0) -> list[list[Sample]]:
        return self.engines.generate(PROMPTS, SAMPLING, run_seed=0, step=step)

    def restarts(self) -> float:
        return self.pool.supervisor.metrics()["pool/restarts/rollout"]


@pytest.fixture
def stack(ray_cluster: None) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def shared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One pool for many tests: starting a process takes longer than most of them."""
    with ExitStack() as stack:
        yield Running(tmp_path_factory.mktemp("engines"), stack).start()


@pytest.fixture
def running(shared: Running) -> Running:
    """The pool with both engines serving, and no notes yet."""
    deadline = time.monotonic() + 60
    while len(shared.pool.supervisor.serving()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        shared.engines.push(0)
    shared.notes.clear()
    return shared


def tokens(groups: list[list[Sample]]) -> list[tuple[int, ...]]:
    return [s.token_ids for g in groups for s in g]


def test_an_engine_is_held_against_the_policy_when_it_gets_its_first_weights(running: Running) -> None:
    before = running.scored
    running.engines.push(0)
    assert running.scored == before, "engines that were compared are not compared again"
    running.policy_logprob = -3.0  # the engines' stays -1: k3 is exp(-2) + 1
    running.ask("die")
    running.generate()
    deadline = time.monotonic() + 60
    while len(running.pool.supervisor.alive()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(EngineMismatch, match=r"engine \d after its first weights: .*KL of 1\.14 per token"):
        running.engines.push(0)
    running.policy_logprob = -1.0
    running.ask("refuse")
    with pytest.raises(PoolError, match="the prompt is too long"):
        running.engines.push(0)  # the one that differed is compared again
    (running.folder / "refuse").unlink()
    running.engines.push(0)
    assert running.scored == before + 2, "the one that differed, compared again"


def test_a_prompt_that_a_step_drew_twice_is_sampled_with_two_seeds(running: Running) -> None:
    twice = [PROMPTS[0], replace(PROMPTS[0], occurrence=1), PROMPTS[1]]
    one, other, another = running.engines.generate(twice, SAMPLING, run_seed=0, step=0)
    assert len({one[0].token_ids, other[0].token_ids, another[0].token_ids}) == 3


def test_an_engine_that_returns_no_samples_ends_the_run_in_words(running: Running) -> None:
    running.ask("nothing")
    try:
        with pytest.raises(PoolError, match=r"the engine returned NoneType, not a list of \d+ groups of samples"):
            running.generate()
    finally:
        (running.folder / "nothing").unlink()


def test_samples_come_in_the_prompts_order_from_all_engines(running: Running) -> None:
    groups = running.generate()
    assert [g[0].prompt_index for g in groups] == list(range(len(PROMPTS)))
    assert [[s.sample_index for s in g] for g in groups] == [[0, 1]] * len(PROMPTS)
    assert len({s.text for g in groups for s in g}) == 2, "both engines took part"
    assert {s.weight_version for g in groups for s in g} == {0}
    assert tokens(running.generate()) == tokens(groups), "the same seed and step"
    assert tokens(running.generate(step=1)) != tokens(groups)


@pytest.mark.parametrize(
    ("fault", "note"),
    [("die", "its process is gone"), ("lost", "EngineLost"), ("hang", "no answer to generate within 4 s")],
)
def test_an_engine_that_is_lost_costs_its_prompts_a_second_try(running: Running, fault: str, note: str) -> None:
    calm = tokens(running.generate())
    running.ask(fault)
    before = running.restarts()
    assert tokens(running.generate()) == calm, "the seeds belong to the prompts, not to the engine"
    assert running.restarts() == before + 1
    assert note in running.notes[0]


def test_a_silent_engine_is_replaced_though_nobody_waits_for_it(running: Running) -> None:
    running.ask("silent")
    deadline = time.monotonic() + 20
    while not any("no heartbeat within 2 s" in note for note in running.notes):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(running.generate()) == len(PROMPTS)


def test_an_engine_that_fails_in_an_update_is_replaced_and_the_push_goes_on(running: Running) -> None:
    running.ask("torn")
    running.engines.push(0)
    assert any("the update left 3 parameters unchanged, in update_weights" in note for note in running.notes)
    assert len(running.pool.supervisor.serving()) == 1
    assert len(running.generate()) == len(PROMPTS)


def test_a_push_that_the_policy_did_not_finish_names_the_engines_that_are_gone(running: Running) -> None:
    alive = running.pool.supervisor.alive()
    first = min(alive)

    def send(client: EngineClient, backend: str, timeout_s: float) -> dict[int, str]:
        assert timeout_s == 2 * running.engines.timeout_s
        ray.kill(alive[first])
        raise PoolError("policy", "send_weights", "no answer within 8 s", lost=True)

    with patch.object(running.engines, "send", send), pytest.raises(PoolError) as caught:
        running.engines.push(0)
    assert f"no answer within 8 s; engines that do not answer: {first} is gone" in str(caught.value)
    assert caught.value.lost


def test_all_calls_of_a_push_share_one_deadline(running: Running) -> None:
    client = EngineClient(running.pool.supervisor.alive(), 1, 5.0)
    client.start_weight_update()
    assert client._deadline is not None
    client._deadline -= 5.0
    client.update_weights(["weights"])  # nothing answers in no time
    assert client.lost
    assert all("update_weights within 5 s of the push's beginning" in cause for cause in client.lost.values())


def test_the_only_engine_is_succeeded_with_weights_until_the_budget_is_spent(stack: ExitStack, tmp_path: Path) -> None:
    running = Running(tmp_path, stack, num_engines=1, max_restarts=1).start()
    running.engines.push(7)
    running.ask("die")
    assert {s.weight_version for g in running.generate() for s in g} == {7}
    assert running.sent == [[0]] * 3, "two pushes, and one to the successor before it serves"
    running.ask("die")
    with pytest.raises(RestartBudgetExhausted, match=r"used its 1 restarts.*its process is gone"):
        running.generate()


def test_a_request_that_no_engine_can_serve_is_an_error_and_costs_no_engine(running: Running) -> None:
    running.ask("refuse")
    before = running.restarts()
    with pytest.raises(PoolError, match="ValueError: the prompt is too long") as caught:
        running.generate()
    (running.folder / "refuse").unlink()
    assert not caught.value.lost
    assert running.restarts() == before
    assert len(running.generate()) == len(PROMPTS)


def test_an_engine_that_does_not_start_ends_the_run_at_once(stack: ExitStack, tmp_path: Path) -> None:
    running = Running(tmp_path, stack, num_engines=1)
    running.ask("no-start")
    with pytest.raises(PoolError, match="RuntimeError: there is no model here"):
        running.start()


def test_an_engine_says_which_weight_transfers_it_takes(ray_cluster: None) -> None:
    assert weight_backend(fake_config()) == "safetensors"
    with pytest.raises(ConfigError, match=r"rollout\.weight_transfer=nccl: rollout\.engine=.*takes safetensors"):
        weight_backend(fake_config(weight_transfer="nccl"))


def test_shares_hold_every_prompt_once() -> None:
    for count, parts in ((0, 4), (3, 8), (40, 16)):
        shares = split(count, parts)
        assert sorted(p for share in shares for p in share) == list(range(count))
        assert len(shares) == min(count, parts)
