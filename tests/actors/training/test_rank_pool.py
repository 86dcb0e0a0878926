"""What the pools of ranks share, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.training.rank_pool import SharedBatch, in_batch_order, rank_actor
from dvpo_service.config import KLConfig
from dvpo_service.objectives.preparation import prepare_rewards
from tests.builders import make_rollouts


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What goes into Ray's store."""
    objects: list[Any] = []
    monkeypatch.setattr("ray.put", lambda value: objects.append(value) or len(objects))
    return objects


def test_a_batch_goes_into_rays_store_once_a_step(stored: list[Any]) -> None:
    """The policy asks first, then the critic with prepared rewards, then the policy's update."""
    batch, rollouts = SharedBatch(), make_rollouts()
    first, nothing = batch.share(rollouts)
    old = rollouts.rollout_logprobs
    scored = rollouts.with_(logprobs=old, ref_logprobs=old - 1)
    prepared = prepare_rewards(scored, KLConfig(coef=0.5, where="reward"))
    second, changes = batch.share(prepared)
    third, _ = batch.share(prepared)
    assert first == second == third
    assert nothing == {}
    assert changes.keys() == {"logprobs", "ref_logprobs", "rewards"}
    again = stored[0].with_(**changes)
    assert torch.equal(again.rewards, prepared.rewards), "what a rank puts together is what the loop has"
    assert len(stored) == 1
    batch.share(make_rollouts(seed=1))
    assert len(stored) == 2, "the next step's batch is another"


def test_rows_of_ranks_are_put_back_in_order() -> None:
    rows = torch.tensor([2, 0, 3, 1])
    parts = [torch.tensor([[2.0], [0.0]]), torch.tensor([[3.0], [1.0]])]
    assert in_batch_order(rows, parts).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_actor_of_a_rank_has_its_workers_methods_and_is_built_when_it_is_told_where_to_meet() -> None:
    class Worker:
        def __init__(self, config: str, meet: int):
            self.told = (config, meet)

        def update(self) -> tuple[str, int]:
            return self.told

    rank = rank_actor(Worker)()
    with pytest.raises(AttributeError):
        rank.update()
    rank.setup("a config", 3)
    assert rank.update() == ("a config", 3)
    assert isinstance(rank, Worker)
