"""Weights reach the engine: its log-probs equal the trainer's, also after the model has changed a lot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from actors.cluster.connect import connected
from actors.cluster.placement import Placement, plan_bundles
from actors.cluster.pool import PoolError
from actors.rollouts.engines import EnginePool
from actors.training.policy import PolicyWorker
from actors.training.rank_pool import RankPool
from actors.weights.sync import SendWeights, SyncedEngines
from actors.weights.transfer import EngineClient
from dvpo_service.algo.policy_loss import token_logprobs
from dvpo_service.config import Config
from dvpo_service.models.load import load_causal_lm
from dvpo_service.types import Prompt, Sampling
from tests.builders import make_config

pytestmark = pytest.mark.e2e

SEQUENCES = [
    [2, 20, 21, 14, 22, 32, 3, 19, 25, 1],
    [2, 23, 14, 23, 32, 3, 22, 1],
    [2] + [20 + i % 9 for i in range(30)],
]


class ScrambledPolicy(PolicyWorker):
    """A policy whose weights can be changed as much as a long training would change them."""

    def scramble(self, scale: float) -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.trainer.module.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)


def scrambled_policy(config: Config, model: Path, placement: Placement) -> RankPool:
    arguments = (config, str(model))
    return RankPool("policy", ScrambledPolicy, arguments, config.policy.world_size, placement, timeout_s=300)


def sender(policy: RankPool) -> SendWeights:
    return lambda client, backend, timeout_s: policy.call(
        PolicyWorker.send_weights, client, backend, timeout_s=timeout_s
    )[0]


@contextmanager
def policy_and_engines(config: Config, model: Path) -> Iterator[tuple[RankPool, EnginePool, SyncedEngines]]:
    with connected(config):
        placement = Placement(plan_bundles(config), timeout_s=60)
        policy = scrambled_policy(config, model, placement)
        engines = EnginePool.spawn(config, str(model), "safetensors", placement)
        engines.supervisor.start()
        policy.setup().result()
        engines.supervisor.wait_started()
        yield policy, engines, SyncedEngines(config, engines, "safetensors", sender(policy))
        engines.shutdown()


@pytest.fixture(scope="module")
def system(tiny_model: Path) -> Iterator[tuple[RankPool, EnginePool, SyncedEngines]]:
    # torch.compile is on, because a compiled graph could keep old weights. From two ranks to two workers of an engine.
    rollout = {"enforce_eager": False, "tensor_parallel_size": 2}
    config = make_config(tiny_model, policy={"world_size": 2, "mini_batch_size": 8}, rollout=rollout)
    with policy_and_engines(config, tiny_model) as system:
        yield system


def engine_logprobs(engines: EnginePool) -> list[Tensor]:
    """Return the engine's log-probs, one sequence at a time: other sequences in a batch change the last digits."""
    return [torch.tensor(ray.get(engines.actors[0].score.remote([s]), timeout=60)[0]) for s in SEQUENCES]


def model_logprobs(folder: Path | str) -> list[Tensor]:
    """Return the log-probs of a model folder by plain transformers, without any part of the service."""
    model = load_causal_lm(str(folder))
    results = []
    with torch.no_grad():
        for sequence in SEQUENCES:
            ids = torch.tensor([sequence])
            results.append(token_logprobs(model(input_ids=ids).logits[:, :-1], ids[:, 1:])[0])
    return results


def furthest(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_engine_equals_trainer_after_a_large_change(
    system: tuple[RankPool, EnginePool, SyncedEngines], tiny_model: Path, tmp_path: Path
) -> None:
    policy, engines, weights = system
    weights.push(0)
    before = engine_logprobs(engines)
    assert furthest(before, model_logprobs(tiny_model)) < 1e-4

    policy.call(ScrambledPolicy.scramble, 0.3)
    policy.call(PolicyWorker.export, str(tmp_path / "changed"))
    wanted = model_logprobs(tmp_path / "changed")
    assert furthest(before, wanted) > 1.0, "the change must be large, or stale weights would pass"
    assert furthest(engine_logprobs(engines), before) < 1e-6, "no weights move before a push"

    weights.push(1)
    assert furthest(engine_logprobs(engines), wanted) < 1e-4


def test_samples_carry_the_version_and_the_log_probs_of_their_weights(
    system: tuple[RankPool, EnginePool, SyncedEngines], tmp_path: Path
) -> None:
    policy, _, weights = system
    # Together the prompts have more tokens than the engine takes in one batch.
    ask = ({"role": "user", "content": "?"},)
    prompts = [Prompt(i, ask, "1", "t", (2, *([20 + i % 9] * 40), 3)) for i in range(150)]
    weights.push(7)
    policy.call(PolicyWorker.export, str(tmp_path / "now"))
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=6)
    groups = weights.generate(prompts, sampling, run_seed=0, step=3)
    assert [g[0].prompt_index for g in groups] == list(range(150))
    assert {s.weight_version for g in groups for s in g} == {7}
    assert [len(g) for g in groups] == [2] * 150

    model = load_causal_lm(str(tmp_path / "now"))
    for prompt, group in list(zip(prompts, groups, strict=True))[:5]:
        for sample in group:
            ids = torch.tensor([prompt.token_ids + sample.token_ids])
            with torch.no_grad():
                logprobs = token_logprobs(model(input_ids=ids).logits[:, :-1], ids[:, 1:])[0]
            assert torch.allclose(logprobs[len(prompt.token_ids) - 1 :], torch.tensor(sample.logprobs), atol=1e-4)

    def tokens(step: int) -> list[tuple[int, ...]]:
        return [s.token_ids for g in weights.generate(prompts, sampling, run_seed=0, step=step) for s in g]

    first = [s.token_ids for g in groups for s in g]
    assert tokens(3) == first, "the same seed and step sample the same tokens"
    assert tokens(4) != first


class FarClient(EngineClient):
    """A client for which every engine is on another host than the trainer."""

    def reading(self, path: str) -> dict[int, bool]:
        return dict.fromkeys(super().reading(path), False)


def test_an_engine_on_another_host_gets_the_same_weights_to_the_bit(
    system: tuple[RankPool, EnginePool, SyncedEngines], tmp_path: Path
) -> None:
    policy, engines, weights = system
    policy.call(ScrambledPolicy.scramble, 0.3)
    weights.push(20)
    near = engine_logprobs(engines)
    policy.call(ScrambledPolicy.scramble, -0.3)
    policy.call(PolicyWorker.export, str(tmp_path / "scrambled"))
    policy.call(PolicyWorker.send_weights, FarClient(engines.supervisor.alive(), 1, 300), "safetensors")
    ray.get(engines.actors[0].set_version.remote(21), timeout=60)
    far = engine_logprobs(engines)
    assert furthest(far, near) > 1.0, "new weights"
    assert furthest(far, model_logprobs(tmp_path / "scrambled")) < 1e-4
    weights.push(22)
    assert furthest(far, engine_logprobs(engines)) == 0.0


def test_stale_weights_are_seen(
    system: tuple[RankPool, EnginePool, SyncedEngines], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The comparison in the tests above does fail if the engine does not take the weights."""
    policy, engines, weights = system
    weights.push(8)
    policy.call(ScrambledPolicy.scramble, 0.3)
    policy.call(PolicyWorker.export, str(tmp_path / "unsent"))
    ray.get(engines.actors[0].set_version.remote(9), timeout=60)  # acknowledged, but nothing was sent
    assert furthest(engine_logprobs(engines), model_logprobs(tmp_path / "unsent")) > 1.0


def test_a_dead_engine_is_replaced_and_gets_the_weights_before_it_serves(
    system: tuple[RankPool, EnginePool, SyncedEngines],
) -> None:
    _, engines, weights = system
    weights.push(10)
    sampling = Sampling(n=1, temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=6)
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "1", "t", (2, 20 + i, 3)) for i in range(9)]

    def tokens() -> list[tuple[int, ...]]:
        groups = weights.generate(prompts, sampling, run_seed=0, step=3)
        assert {s.weight_version for g in groups for s in g} == {10}
        return [s.token_ids for g in groups for s in g]

    before = tokens()
    doomed: Any = engines.actors[0]
    ray.kill(doomed)
    assert tokens() == before, "the only engine: its successor starts, is given version 10, and samples the same"
    assert engines.actors[0] is not doomed
    assert engines.supervisor.metrics()["pool/restarts/rollout"] == 1


def test_prompts_at_the_limit_are_sampled_and_one_beyond_is_one_line(
    system: tuple[RankPool, EnginePool, SyncedEngines],
) -> None:
    _, engines, sync = system
    sync.push(version=3)
    sampling = Sampling(2, 1.0, 1.0, -1, 8)
    limit = engines.config.data.max_prompt_tokens

    def sample(tokens: int) -> list[Any]:
        prompt = Prompt(0, ({"role": "user", "content": "x"},), "1", "t", (20,) * tokens)
        return sync.generate([prompt], sampling, run_seed=0, step=3)[0]

    for length in (1, limit):
        for s in sample(length):
            assert 1 <= len(s.token_ids) == len(s.logprobs) <= 8
    # data.max_prompt_tokens keeps data of that length out; an engine refuses it and goes on.
    with pytest.raises(PoolError) as caught:
        sample(engines.config.max_model_len + 1)
    assert "\n" not in str(caught.value)
    assert str(engines.config.max_model_len) in str(caught.value)
    assert len(sample(limit)) == 2
