"""The stream, with engines and reward workers in memory: dynamic sampling, the overlong penalty, the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from actors.rollouts import cache
from actors.rollouts.reward import Work
from actors.rollouts.stream import SyncStream, score_samples
from dvpo_service.data.dataset import Dataset
from dvpo_service.errors import RewardsFailed
from dvpo_service.rewards.seeds import sample_seed
from dvpo_service.types import Prompt, Sample, Score
from tests.builders import make_config


@dataclass
class FakeEngines:
    asked: list[list[int]] = field(default_factory=list)

    def generate(
        self, prompts: list[Prompt], sampling: Any, *, run_seed: int, step: int, check: Any
    ) -> list[list[Sample]]:
        self.asked.append([p.index for p in prompts])
        return [
            [Sample(p.index, j, (5,) * (j + 1), (-1.0,) * (j + 1), "x" * (j + 1), "stop", step) for j in range(4)]
            for p in prompts
        ]


@dataclass
class FakeLedger:
    used: list[tuple[int, list[int], int]] = field(default_factory=list)

    def write(self, step: int, prompts: list[int], failed: int) -> None:
        self.used.append((step, prompts, failed))


@dataclass
class FakeRewards:
    """Prompts with an even index get equal rewards."""

    flat: Any = lambda index: index % 2 == 0

    def score(self, work: list[Work], *, noisy: bool) -> list[list[Score]]:
        return [[Score(r, r) for r in ((1.0,) * 4 if self.flat(int(w.answer)) else (0.0, 1.0, 0.0, 1.0))] for w in work]


def make_stream(tiny_model: Path, prompts: int = 16, rewards: FakeRewards | None = None, **sections: Any) -> SyncStream:
    sections["rollout"] = {"prompts_per_step": 4, "n": 4, "max_new_tokens": 8} | sections.get("rollout", {})
    rows = tuple(Prompt(i, ({"role": "user", "content": "?"},), str(i), "test", (7, 8)) for i in range(prompts))
    config = make_config(tiny_model, **sections)
    return SyncStream(
        config, Dataset("test", rows, ("",) * prompts), FakeEngines(), rewards or FakeRewards(), FakeLedger()
    )  # type: ignore[arg-type]


def test_without_dynamic_sampling_a_batch_is_one_draw(tiny_model: Path) -> None:
    stream = make_stream(tiny_model)
    batch = stream.next(0)
    assert [len(a) for a in stream.engines.asked] == [4]  # type: ignore[attr-defined]
    assert batch.rollouts.prompt_index.tolist() == [i for i in stream.engines.asked[0] for _ in range(4)]  # type: ignore[attr-defined]


def test_groups_without_spread_are_replaced(tiny_model: Path) -> None:
    stream = make_stream(tiny_model, rollout={"dynamic_sampling": True, "max_draws": 9})
    batch = stream.next(0)
    asked: list[list[int]] = stream.engines.asked  # type: ignore[attr-defined]
    useful = [i for draw in asked for i in draw if i % 2]
    assert batch.rollouts.prompt_index[::4].tolist() == useful, "every useful group, in the order drawn"
    assert len(useful) == 4
    assert batch.metrics["rollout/draws"] == len(asked) > 1
    drawn = sum(map(len, asked))
    assert batch.metrics["reward/groups_without_spread"] == pytest.approx((drawn - 4) / drawn), "of all drawn"
    assert len(batch.rows) == 16


def test_draws_end_and_the_batch_keeps_its_size(tiny_model: Path) -> None:
    stream = make_stream(
        tiny_model, rollout={"dynamic_sampling": True, "max_draws": 3}, rewards=FakeRewards(lambda i: True)
    )
    batch = stream.next(0)
    assert len(stream.engines.asked) == 3  # type: ignore[attr-defined]
    assert len(batch.rollouts) == 16


def test_every_prompt_is_drawn_once_an_epoch_also_by_dynamic_sampling(tiny_model: Path) -> None:
    stream = make_stream(tiny_model, rollout={"dynamic_sampling": True})
    for step in range(4):
        stream.next(step)
    drawn = [i for draw in stream.engines.asked for i in draw]  # type: ignore[attr-defined]
    whole = len(drawn) // 16 * 16
    for start in range(0, whole, 16):
        assert sorted(drawn[start : start + 16]) == list(range(16))


def test_long_answers_lose_reward_but_not_clean_reward(tiny_model: Path) -> None:
    stream = make_stream(
        tiny_model,
        rewards=FakeRewards(lambda i: True),
        rollout={"max_new_tokens": 4},
        reward={"overlong_buffer": 2, "overlong_penalty": 0.5},
    )
    rollouts = stream.next(0).rollouts
    assert rollouts.scores[:4].tolist() == [1.0, 1.0, 0.75, 0.5], "lengths 1 to 4 of at most 4"
    assert rollouts.clean_scores[:4].tolist() == [1.0] * 4


def test_a_step_done_again_takes_its_scored_rollouts_from_memory(tiny_model: Path) -> None:
    stream = make_stream(tiny_model, rollout={"dynamic_sampling": True})
    cursors, batches = [], []
    for step in range(4):
        cursors.append(stream.state_dict())
        batches.append(stream.next(step))
    end = stream.state_dict()
    calls = len(stream.engines.asked)  # type: ignore[attr-defined]
    stream.load_state_dict(cursors[2])
    again = [stream.next(step) for step in (2, 3)]
    assert len(stream.engines.asked) == calls, "nothing was sampled again"  # type: ignore[attr-defined]
    assert [b.rollouts is a.rollouts for b, a in zip(again, batches[2:], strict=True)] == [True, True]
    assert [b.metrics["rollout/reused"] for b in batches + again] == [0] * 4 + [16, 16]
    assert again[0].metrics["time/generate"] == 0
    assert stream.state_dict() == end
    used = stream.ledger.used  # type: ignore[attr-defined]
    assert used[2:4] == used[4:], "the ledger has what the steps really use"


def test_rollouts_of_other_prompts_are_not_reused(tiny_model: Path) -> None:
    stream = make_stream(tiny_model)
    start = stream.state_dict()
    for step in range(3):
        stream.next(step)
    stream.load_state_dict(start)
    assert stream.next(1).metrics["rollout/reused"] == 0, "step 1, but the prompts of step 0 are due"


def test_the_memory_for_reuse_is_bounded(tiny_model: Path) -> None:
    one = cache.size(make_stream(tiny_model).next(0).rollouts)
    stream = make_stream(tiny_model, rollout={"reuse_gib": 2.5 * one / 2**30})
    for step in range(4):
        stream.next(step)
    assert list(stream.cache.batches) == [2, 3]
    none = make_stream(tiny_model, rollout={"reuse_gib": 0})
    none.next(0)
    assert not none.cache.batches


def test_a_prompt_drawn_twice_in_a_step_is_sampled_twice_and_not_copied(tiny_model: Path) -> None:
    """Three prompts, four a step: the epoch ends inside of the batch, and one prompt comes again."""
    stream = make_stream(tiny_model, prompts=3)
    seen: list[list[tuple[int, int]]] = []
    generate = stream.engines.generate

    def recording(prompts: list[Prompt], sampling: Any, **given: Any) -> list[list[Sample]]:
        seen.append([(p.index, sample_seed(0, given["step"], p.index, 0, p.occurrence)) for p in prompts])
        return generate(prompts, sampling, **given)

    stream.engines.generate = recording  # type: ignore[method-assign]
    for step in range(6):
        stream.next(step)
    for step, drawn in enumerate(seen):
        assert len({index for index, _ in drawn}) < 4, "a prompt comes twice"
        assert len({seed for _, seed in drawn}) == 4, "but no seed does"
        index, seed = drawn[0]
        assert seed == sample_seed(0, step, index, 0), "the first time its seed is that of the prompt alone"


def test_the_two_have_noise_of_their_own() -> None:
    class Recording:
        def score(self, work: list[Work], *, noisy: bool) -> list[list[Score]]:
            self.seeds, self.rows = [w.seeds for w in work], [(w.row, w.messages, w.source) for w in work]
            return []

    chat: Any = ({"role": "user", "content": "?"},)
    prompt, rewards = Prompt(0, chat, "1", "t", row={"level": 3}), Recording()
    group = [Sample(0, i, (1,), (-1.0,), "1", "stop", 0) for i in range(2)]
    prompts = [prompt, replace(prompt, occurrence=1)]
    score_samples(rewards, prompts, [group, group], run_seed=0, step=0, noisy=True)  # type: ignore[arg-type]
    assert len({seed for seeds in rewards.seeds for seed in seeds}) == 4
    assert rewards.rows == [({"level": 3}, chat, "t")] * 2, "the row reaches the reward"


def test_a_prompt_drawn_again_by_dynamic_sampling_has_other_seeds_too(tiny_model: Path) -> None:
    stream = make_stream(
        tiny_model, prompts=5, rollout={"dynamic_sampling": True, "max_draws": 3}, rewards=FakeRewards(lambda i: True)
    )
    occurrences: dict[int, list[int]] = {}
    generate = stream.engines.generate

    def recording(prompts: list[Prompt], sampling: Any, **given: Any) -> list[list[Sample]]:
        for p in prompts:
            occurrences.setdefault(p.index, []).append(p.occurrence)
        return generate(prompts, sampling, **given)

    stream.engines.generate = recording  # type: ignore[method-assign]
    stream.next(0)
    assert sum(map(len, occurrences.values())) == 12
    assert all(times == list(range(len(times))) for times in occurrences.values())


def test_a_long_right_answer_is_no_spread_for_dynamic_sampling(tiny_model: Path) -> None:
    """DAPO filters on correctness: the overlong penalty alone teaches nothing about right and wrong."""
    stream = make_stream(
        tiny_model,
        rewards=FakeRewards(lambda i: True),
        rollout={"max_new_tokens": 4, "dynamic_sampling": True, "max_draws": 2},
        reward={"overlong_buffer": 2, "overlong_penalty": 0.5},
    )
    batch = stream.next(0)
    assert batch.metrics["rollout/draws"] == 2, "every group was equally right, so others were drawn"
    assert batch.rollouts.scores[:4].tolist() == [1.0, 1.0, 0.75, 0.5]


def test_a_step_without_one_score_ends_the_run_with_the_first_error(tiny_model: Path) -> None:
    class Failing(FakeRewards):
        def score(self, work: list[Work], *, noisy: bool) -> list[list[Score]]:
            nan = float("nan")
            return [[Score(nan, nan, "NameError: name 'reponse' is not defined")] * 4 for _ in work]

    with pytest.raises(RewardsFailed, match=r"none of the 16 responses of step 1 .* NameError: name 'reponse'"):
        make_stream(tiny_model, rewards=Failing()).next(0)
