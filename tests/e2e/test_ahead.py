"""Generating ahead with real engines: weights that arrive in the middle of responses, and a run through faults."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.rollouts.engines import EnginePool
from actors.training.policy import PolicyWorker
from actors.training.rank_pool import RankPool
from actors.weights.sync import SyncedEngines
from dvpo_service.algo.policy_loss import token_logprobs
from dvpo_service.data.ledger import check_ledger
from dvpo_service.models.load import load_causal_lm
from dvpo_service.types import Prompt, Sample, Sampling
from tests.builders import make_config
from tests.chaos.family import gone
from tests.chaos.settings import write_config
from tests.chaos.test_recovery import PROMPTS, STEPS, chaos_config, family_of, finish, kills, rows, start
from tests.e2e.test_stop import wait_for_step
from tests.e2e.test_weight_sync import ScrambledPolicy, policy_and_engines

pytestmark = pytest.mark.e2e

BOUND, STOP_AT = 2, 9
EXACT = 1e-4


@pytest.fixture(scope="module")
def system(tiny_model: Path) -> Iterator[tuple[RankPool, EnginePool, SyncedEngines]]:
    rollout = {"max_staleness": 1, "max_new_tokens": 96, "max_num_seqs": 64}
    config = make_config(tiny_model, rollout=rollout, data={"max_prompt_tokens": 16})
    with policy_and_engines(config, tiny_model) as system:
        yield system


def logprobs(folder: Path, prompt: Prompt, sample: Sample) -> Tensor:
    """Return the log-probs of the sample's tokens, by plain transformers."""
    ids = torch.tensor([prompt.token_ids + sample.token_ids])
    with torch.no_grad():
        all_logprobs = token_logprobs(load_causal_lm(str(folder))(input_ids=ids).logits[:, :-1], ids[:, 1:])[0]
    return all_logprobs[len(prompt.token_ids) - 1 :]


def test_a_response_goes_on_with_the_new_weights_and_each_token_has_the_log_prob_of_its_own(
    system: tuple[RankPool, EnginePool, SyncedEngines], tmp_path: Path
) -> None:
    policy, _, weights = system
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "1", "t", (2, 20 + i % 9, 3)) for i in range(64)]
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=96)
    weights.push(0)
    weights.generate(prompts[:4], sampling, run_seed=0, step=0)  # compiles what the first generation needs
    policy.call(PolicyWorker.export, str(tmp_path / "old"))
    policy.call(ScrambledPolicy.scramble, 0.05)
    policy.call(PolicyWorker.export, str(tmp_path / "new"))

    groups: list[list[Sample]] = []
    thread = threading.Thread(
        target=lambda: groups.extend(weights.generate(prompts, sampling, run_seed=0, step=1, check=lambda: None))
    )
    thread.start()
    time.sleep(0.3)
    weights.push(1)
    assert thread.is_alive(), "the push must come in the middle"
    thread.join(120)

    switched = 0
    for prompt, sample in [(p, s) for p, g in zip(prompts, groups, strict=True) for s in g]:
        mine = torch.tensor(sample.logprobs)
        old, new = (logprobs(tmp_path / name, prompt, sample) for name in ("old", "new"))
        by_old, by_new = (mine - old).abs() < EXACT, (mine - new).abs() < EXACT
        first = int((~by_old).nonzero()[0]) if not bool(by_old.all()) else len(mine)
        assert bool(by_new[first:].all()), f"tokens {first} on are the new weights', cache and all"
        switched += 0 < first < len(mine)
        assert sample.weight_version == (1 if first == 0 and sample.weight_version == 1 else 0), "the oldest token's"
    assert switched > 10, "responses that both weights took part in"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run that generates ahead. It loses an engine, is asked to stop, and is continued."""
    folder = tmp_path_factory.mktemp("ahead")
    tree = chaos_config(tiny_model, folder)
    tree["rollout"]["max_staleness"] = BOUND
    for pool in ("critic", "policy"):
        tree[pool] = tree[pool] | {"world_size": 1}  # no rank is lost in this run
    config = write_config(folder / "chaos.yaml", tree)
    faults = [k for k in kills() if k.kind == "engine"]
    process = start(config, folder / "run", faults)
    family = family_of(process)
    wait_for_step(process, folder / "run", STOP_AT)
    family.look()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    gone(family.left, 90)
    gone(finish(start(config, folder / "run", faults), folder / "run").left, 90)
    return folder / "run"


def test_a_run_through_faults_uses_no_token_older_than_the_bound(run_dir: Path) -> None:
    metrics = rows(run_dir)
    assert [r["step"] for r in metrics] == list(range(STEPS + 1))
    stale = [r["rollout/staleness"] for r in metrics[1:]]
    assert 1 <= max(stale) <= BOUND
    assert max(r["pool/restarts/rollout"] for r in metrics[1:])


def test_its_ledger_is_exact(run_dir: Path) -> None:
    assert not check_ledger(run_dir / "ledger.jsonl", PROMPTS)
    assert [r["step"] for r in rows(run_dir, "ledger.jsonl")] == list(range(STEPS))


def test_the_engines_log_probs_differ_from_the_trainers_where_tokens_are_stale_and_there_alone(run_dir: Path) -> None:
    metrics = rows(run_dir)[1:]
    assert all(r["policy/rollout_kl"] < 1e-9 for r in metrics if r["rollout/staleness"] == 0)
    assert any(r["policy/rollout_kl"] > 1e-9 for r in metrics if r["rollout/staleness"] > 0)
