"""``module:name`` in a config: what is wrong with it is one line, before anything starts."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from dvpo_service.commands.check_plugins import check_plugins
from dvpo_service.config import Config, load_config, to_yaml
from dvpo_service.data.dataset import load_prompts
from dvpo_service.errors import ConfigError, DataError
from dvpo_service.estimators.base import CriticObjective
from dvpo_service.registry import engines, estimators, policy_losses
from tests.builders import make_config

MODULE = """
import torch
from dvpo_service.estimators.base import estimator
from dvpo_service.estimators.dvpo import DvpoObjective
from dvpo_service.roles import Engine

number = 3
def bare(rollouts, algorithm): return rollouts.rewards
@estimator(needs_groups=True)
def good(rollouts, algorithm): return rollouts.rewards
@estimator()
def narrow(rollouts, algorithm): return rollouts.rewards[:, 0]
@estimator()
def raises(rollouts, algorithm): return rollouts.nothing
@estimator()
def one_argument(rollouts): return rollouts.rewards
@estimator(needs_critic=True)
def no_class(rollouts, algorithm): return rollouts.rewards
@estimator(needs_critic=True, distributional=True)
class Objective(DvpoObjective): pass
@estimator(needs_critic=True, distributional=True)
class Flat(DvpoObjective):
    def loss(self, *args, **given):
        total, parts = super().loss(*args, **given)
        return total[None], parts
@estimator(needs_critic=True, distributional=True)
class Dead(DvpoObjective):
    def loss(self, *args, **given):
        total, parts = super().loss(*args, **given)
        return total.detach(), parts
@estimator(needs_critic=True, distributional=True)
class Pair(DvpoObjective):
    def estimate(self, *args, **given): return super().estimate(*args, **given), None
@estimator(needs_groups=True)
def of_three(rollouts, algorithm):
    return rollouts.rewards - rollouts.rewards.sum(1).view(-1, 3).kthvalue(3).values.repeat_interleave(3)[:, None]

def loss(logprobs, old_logprobs, advantages, mask, policy): return -logprobs * advantages
def no_number(logprobs, old_logprobs, advantages, mask, policy): return -logprobs * float("nan")
def short_loss(logprobs, old_logprobs, advantages, mask, policy): return (-logprobs * advantages).sum(1)
def dead_loss(logprobs, old_logprobs, advantages, mask, policy): return -logprobs.detach() * advantages
def two_arguments(logprobs, advantages): return logprobs

def term(heads, targets, levels): return heads.mean((-2, -1))
def wide_term(heads, targets, levels): return heads.mean(-1)
def cvar(heads, targets, levels): return heads.mean((-2, -1))

class NoUpdate:
    def __init__(self, config, model_path, backend): ...
    async def start(self): ...
class Whole(Engine):
    def __init__(self, config, model_path, backend): ...
    async def start(self): ...
    async def generate(self, prompts, sampling, seeds): ...
    async def update_weights(self, update_info, content=None): ...
class Silent(Engine):
    def __init__(self, config, model_path, backend): ...
    async def start(self): ...
    async def update_weights(self, update_info, content=None): ...
def engine(config, model_path, backend): ...

def row(row): return {"prompt": row["q"], "answer": str(row["a"])}
def many(row): return [{"prompt": f"{row['q']}{i}", "answer": "1"} for i in range(2)]
def some(row): return {"prompt": row["q"], "answer": "1"} if row["a"] else None
def text_row(row): return row["q"]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of one's own, importable."""
    name = f"own_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def config(**sections: Any) -> Config:
    return make_config("model", **sections)


@pytest.mark.parametrize(
    ("section", "key", "name"),
    [
        ("algorithm", "adv_estimator", "good"),
        ("algorithm", "adv_estimator", "Objective"),
        ("policy", "loss", "loss"),
        ("algorithm", "critic_terms", "term"),
        ("rollout", "engine", "Whole"),
    ],
)
def test_what_is_right_passes_and_stands_in_the_resolved_config(
    own: str, section: str, key: str, name: str, tmp_path: Path
) -> None:
    value: Any = {f"{own}:{name}": 0.5} if key == "critic_terms" else f"{own}:{name}"
    resolved = config(**{section: {key: value}})
    check_plugins(resolved)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(resolved))
    assert load_config(str(file)) == resolved


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bare", r"algorithm\.adv_estimator 'own_\w+:bare': it has no `traits`; decorate"),
        ("missing", r"has no function 'missing'"),
        ("number", r"it is of type int, not a function"),
        ("narrow", r"narrow': expected advantages \[B, T\], here \[8, 5\]; got \[8\]"),
        ("raises", r"raises': it fails on a small batch: AttributeError: .*nothing"),
        ("one_argument", r"it must take two arguments, \(rollouts, algorithm\)"),
        ("no_class", r"is a class derived from dvpo_service\.estimators\.base\.CriticObjective"),
        ("Flat", r"Flat': expected the loss, a scalar, here \[\]; got \[1\]"),
    ],
)
def test_an_estimator_that_cannot_be_used_is_one_line(own: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_plugins(config(algorithm={"adv_estimator": f"{own}:{name}"}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "name", "said"),
    [
        (
            "policy",
            "loss",
            "short_loss",
            r"policy\.loss 'own_\w+:short_loss': expected the loss of each token .* got \[4\]",
        ),
        ("policy", "loss", "dead_loss", r"no gradient flows from the loss to logprobs"),
        (
            "policy",
            "loss",
            "two_arguments",
            r"must take five arguments, \(logprobs, old_logprobs, advantages, mask, policy\)",
        ),
        (
            "algorithm",
            "critic_terms",
            "wide_term",
            r"expected a number for each token \[B, T\], here \[2, 5\]; got \[2, 5, 3\]",
        ),
        ("algorithm", "critic_terms", "cvar", r"there is a term named 'cvar' already; rename the function"),
        ("rollout", "engine", "NoUpdate", r"rollout\.engine .*: it has no method generate; derive it from"),
        ("rollout", "engine", "Silent", r"Silent': it does not define generate, for which Engine has no default"),
        ("policy", "loss", "no_number", r"no_number': the loss of a token is not finite on a small batch"),
        ("algorithm", "adv_estimator", "Dead", r"Dead': no gradient flows from the loss to the critic's predictions"),
        ("algorithm", "adv_estimator", "Pair", r"Pair': estimate\(\) must return an Estimate, got tuple"),
        ("rollout", "engine", "engine", r"it must be a class with the methods of dvpo_service\.roles\.Engine"),
    ],
)
def test_a_part_that_cannot_be_used_is_one_line(own: str, section: str, key: str, name: str, said: str) -> None:
    value: Any = {f"{own}:{name}": 0.5} if key == "critic_terms" else f"{own}:{name}"
    with pytest.raises(ConfigError, match=said) as caught:
        check_plugins(config(**{section: {key: value}}))
    assert "\n" not in str(caught.value)


def test_an_estimator_is_tried_with_as_many_samples_as_the_run_has(own: str) -> None:
    algorithm = {"adv_estimator": f"{own}:of_three"}
    check_plugins(config(rollout={"n": 3, "prompts_per_step": 8}, algorithm=algorithm))
    with pytest.raises(ConfigError, match="of_three': it fails on a small batch"):
        check_plugins(config(rollout={"n": 4}, algorithm=algorithm))


def test_a_run_with_an_estimator_of_ones_own_is_read_without_it(own: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config(algorithm={"adv_estimator": f"{own}:good"})).replace(own, "not_on_this_machine"))
    assert load_config(str(file)).algorithm.adv_estimator == "not_on_this_machine:good", "dvpo serve needs no estimator"


def test_a_module_that_is_not_there_is_told_by_key_and_name() -> None:
    with pytest.raises(ConfigError, match=r"policy\.loss 'nowhere:loss': module 'nowhere' cannot be imported"):
        check_plugins(config(policy={"loss": "nowhere:loss"}))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.adv_estimator=grop", r"adv_estimator: did you mean 'grpo'\? use one of dvpo, gae.*or module:name"),
        ("policy.loss=gpso", r"policy\.loss: did you mean 'gspo'\? use one of ppo, gspo, cispo, or module:name"),
        ("rollout.engine=vlm", r"rollout\.engine: did you mean 'vllm'\?"),
        ("data.row_format=alpaca", r"data\.row_format: use auto, or module:name"),
        ("algorithm.critic_terms={narrow: 0.1}", r"'narrow': write each term as module:name"),
        ("algorithm.critic_terms={'a:b': -1}", r"greater than or equal to 0"),
    ],
)
def test_a_name_that_is_neither_is_refused_with_the_nearest(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("demo", [override])


def test_critic_terms_need_a_distribution(own: str) -> None:
    with pytest.raises(ConfigError, match="adv_estimator=gae has no distributional critic"):
        load_config("demo-gae", [f"algorithm.critic_terms={{'{own}:term': 0.1}}"])


def test_an_estimator_of_groups_needs_groups(own: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.n must be 2 or more"):
        load_config("demo", [f"algorithm.adv_estimator={own}:good", "rollout.n=1", "rollout.prompts_per_step=256"])


def test_every_built_in_is_there_and_its_class_says_what_the_registry_says() -> None:
    for name, entry in estimators.ESTIMATORS.items():
        target = estimators.load(name)
        if entry.traits.needs_critic:
            assert issubclass(target, CriticObjective)
            assert target.traits == entry.traits
        config(algorithm={"adv_estimator": name})
    for name in policy_losses.POLICY_LOSSES:
        assert callable(policy_losses.load(name))
    for name in engines.ENGINES:
        assert engines.load(name)


def rows(own: str, function: str, tmp_path: Path) -> list[tuple[str, str]]:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "1+1=", "a": 2}\n{"q": "1+2=", "a": 0}\n')
    data = load_prompts([file], name="t", row_format=f"{own}:{function}")
    return [(p.messages[-1]["content"], p.answer) for p in data.prompts]


def test_rows_of_any_kind_become_prompts(own: str, tmp_path: Path) -> None:
    assert rows(own, "row", tmp_path) == [("1+1=", "2"), ("1+2=", "0")]
    assert rows(own, "many", tmp_path) == [("1+1=0", "1"), ("1+1=1", "1"), ("1+2=0", "1"), ("1+2=1", "1")]
    assert rows(own, "some", tmp_path) == [("1+1=", "1")]


def test_a_row_that_a_format_of_ones_own_does_not_take_is_told_with_its_line(own: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: data\.row_format .* returned str; expected a dict"):
        rows(own, "text_row", tmp_path)
    file = tmp_path / "other.jsonl"
    file.write_text('{"question": "1+1="}\n')
    with pytest.raises(DataError, match=r"other\.jsonl:1: data\.row_format .* raised KeyError: 'q'"):
        load_prompts([file], name="t", row_format=f"{own}:row")
