"""The check whether a plan fits the cluster, as a pure function."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.cluster.connect import _on_this_machine
from actors.cluster.placement import Bundle, check_plan, first_unplaceable, local_cpus, plan_bundles
from dvpo_service.errors import ClusterError
from tests.builders import make_config


def cpus(*counts: float) -> list[Bundle]:
    return [Bundle("policy", i, {"CPU": c}) for i, c in enumerate(counts)]


def test_bundles_are_filled_largest_first() -> None:
    assert first_unplaceable(cpus(1, 3, 2), [{"CPU": 3}, {"CPU": 3}]) is None
    misfit = first_unplaceable(cpus(2, 2, 2), [{"CPU": 3}, {"CPU": 3}])
    assert misfit is not None
    assert misfit.resources == {"CPU": 2}


def test_enough_in_all_is_not_enough_on_one_node() -> None:
    bundle = [Bundle("rollout", 0, {"CPU": 1, "GPU": 2})]
    assert first_unplaceable(bundle, [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}]) == bundle[0]


def test_the_error_names_the_actor_and_what_the_nodes_have() -> None:
    with pytest.raises(ClusterError, match=r"no room for rollout\[1\] \(1 CPU \+ 1 GPU\).*4 CPU \+ 1 GPU"):
        check_plan([Bundle("rollout", i, {"CPU": 1, "GPU": 1}) for i in range(2)], [{"CPU": 4, "GPU": 1}])


def test_a_plan_has_one_bundle_for_each_actor(tiny_model: Path) -> None:
    config = make_config(
        tiny_model,
        policy={"world_size": 2},
        critic={"world_size": 4},
        rollout={"num_engines": 2},
        reward={"num_workers": 3},
    )
    bundles = plan_bundles(config)
    assert [(b.pool, b.index) for b in bundles] == [
        *[("policy", i) for i in range(2)],
        *[("critic", i) for i in range(4)],
        *[("rollout", i) for i in range(2)],
        *[("reward", i) for i in range(3)],
    ]
    assert local_cpus(bundles) >= 2 + 4 + 2 + 1.5


def test_a_cluster_with_too_few_cpus_is_told_how_to_declare_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that a run starts declares what the plan asks for; `ray start` declares the cores."""
    bundles = cpus(1, 1, 1, 0.5)
    with pytest.raises(ClusterError, match=r"or add nodes, or let pools .*`ray start --head --num-cpus=4`"):
        check_plan(bundles, [{"CPU": 2}])
    with pytest.raises(ClusterError, match=r"or add nodes$"):  # enough in all, so more of them is no help
        check_plan([Bundle("rollout", 0, {"CPU": 1, "GPU": 1})], [{"CPU": 8}])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert "4 CPUs on 2 cores" in _on_this_machine(bundles)
    assert "`ray start --head --num-cpus=4`" in _on_this_machine(bundles)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert "cores" not in _on_this_machine(bundles)
