"""The resources that a run's actors need, the check that the cluster has them, and their reservation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from dvpo_service.config import Config
from dvpo_service.errors import ClusterError

POOLS = ("policy", "critic", "rollout", "reward", "reward_model")


@dataclass(frozen=True)
class Bundle:
    """The resources of one actor, by Ray's names (CPU, GPU). ``index`` is the actor's number in its pool."""

    pool: str
    index: int
    resources: Mapping[str, float]

    def __str__(self) -> str:
        needs = " + ".join(f"{v:g} {k}" for k, v in self.resources.items())
        return f"{self.pool}[{self.index}] ({needs})"


def plan_bundles(config: Config) -> list[Bundle]:
    """Return a bundle for every actor of the run, in the order of ``POOLS``; one for all, where it is one process."""
    cluster = config.cluster
    if cluster.in_process:
        return [Bundle("run", 0, {"CPU": 1.0})]
    trainer = {"CPU": cluster.cpus_per_trainer, "GPU": cluster.gpus_per_trainer}
    engine = {"CPU": cluster.cpus_per_engine, "GPU": cluster.gpus_per_engine}
    reward = {"CPU": cluster.cpus_per_reward_worker}
    counts = {
        "policy": (config.policy.world_size, trainer),
        "critic": (config.critic.world_size if config.algorithm.has_critic else 0, trainer),
        "rollout": (config.rollout.num_engines, engine),
        "reward": (config.reward.crew.count(None), reward),
    }
    each = [(pool, i, resources) for pool, (count, resources) in counts.items() for i in range(count)]
    models = [config.reward.parts[k].model for k in config.reward.crew if k is not None]
    each += [("reward_model", i, {"CPU": m.cpus, "GPU": m.gpus}) for i, m in enumerate(models) if m]
    return [Bundle(pool, i, {k: v for k, v in resources.items() if v > 0}) for pool, i, resources in each]


def local_cpus(bundles: Iterable[Bundle]) -> int:
    """Return the number of logical CPUs to declare for a cluster on this machine.

    It is at least what the bundles ask for. Pools take turns, so a plan may have more actors than the machine has
    cores; with the true number Ray would wait for cores that never come.
    """
    return max(os.cpu_count() or 1, _cpus(bundles))


def _cpus(bundles: Iterable[Bundle]) -> int:
    """Return how many CPUs the bundles take together."""
    return math.ceil(sum(b.resources.get("CPU", 0) for b in bundles))


def local_gpus() -> int:
    """Return the number of GPUs on this machine."""
    import torch

    return torch.cuda.device_count()


def first_unplaceable(bundles: Iterable[Bundle], nodes: Iterable[Mapping[str, float]]) -> Bundle | None:
    """Return the first bundle that no node has room for, or None if all fit. The largest are placed first.

    Args:
      nodes: the resources of each node, by Ray's names.
    """
    free = [dict(n) for n in nodes]
    for bundle in sorted(bundles, key=lambda b: sorted(b.resources.items(), reverse=True), reverse=True):
        home = next((n for n in free if all(n.get(k, 0) >= v for k, v in bundle.resources.items())), None)
        if home is None:
            return bundle
        for k, v in bundle.resources.items():
            home[k] -= v
    return None


def check_plan(bundles: list[Bundle], nodes: list[Mapping[str, float]]) -> None:
    """Raise ClusterError, naming the first bundle that does not fit, unless all bundles fit."""
    misfit = first_unplaceable(bundles, nodes)
    if misfit is None:
        return
    have = "; ".join(" + ".join(f"{n.get(k, 0):g} {k}" for k in ("CPU", "GPU")) for n in nodes)
    too_few = sum(n.get("CPU", 0) for n in nodes) < _cpus(bundles)
    declare = f", or let pools take turns on the cores: `ray start --head --num-cpus={_cpus(bundles)}`"
    more = f"or add nodes{declare if too_few else ''}"
    raise ClusterError(
        f"the plan does not fit the cluster: no room for {misfit}. Nodes have: {have or 'none'}. "
        f"Lower {misfit.pool}'s actor count or cluster.cpus_per_* / gpus_per_*, {more}"
    )


def alive_nodes() -> list[Mapping[str, float]]:
    """Return the total resources of every node that is alive."""
    return [n["Resources"] for n in ray.nodes() if n["Alive"]]


class Placement:
    """A reserved placement group with one bundle per actor.

    A trial of a sweep has a placement group already. Its first bundle is the trial's own process, and the others must
    be the run's bundles; they are used, and nothing more is reserved.

    Args:
      bundles: every actor of the run.
      timeout_s: how long to wait for the cluster to free the bundles.

    Raises:
      ClusterError: the bundles do not fit the cluster, were not freed in time, or are not those of the trial's group.
    """

    def __init__(self, bundles: list[Bundle], *, timeout_s: float):
        self.bundles = bundles
        outer = get_current_placement_group()
        self.first = 1 if outer else 0
        if outer:
            self._take_from(outer)
            return
        check_plan(bundles, alive_nodes())
        self.group: PlacementGroup = placement_group([dict(b.resources) for b in bundles], strategy="PACK")
        if not self.group.wait(timeout_seconds=timeout_s):
            remove_placement_group(self.group)
            raise ClusterError(
                f"the cluster is large enough but did not free {len(bundles)} bundles within {timeout_s:g} s; "
                "another job holds them (see `ray status`); wait, or raise cluster.placement_timeout_s"
            )

    def options(self, pool: str, index: int) -> dict[str, Any]:
        """Return the Ray options of the actor ``pool[index]``: its resources and its bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        position, bundle = next((i, b) for i, b in enumerate(self.bundles) if (b.pool, b.index) == (pool, index))
        return {
            "num_cpus": bundle.resources.get("CPU", 0),
            "num_gpus": bundle.resources.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group,
                placement_group_bundle_index=self.first + position,
                placement_group_capture_child_tasks=True,
            ),
        }

    def nodes(self) -> list[str]:
        """Return the ids of the nodes that hold this run's bundles."""
        held = placement_group_table(self.group)["bundles_to_node_id"]
        return sorted({node for i, node in held.items() if self.first <= i < self.first + len(self.bundles)})

    def release(self) -> None:
        """Remove the placement group, unless it is a trial's."""
        if self.first == 0:
            remove_placement_group(self.group)

    def _take_from(self, outer: PlacementGroup) -> None:
        held = [{k: v for k, v in spec.items() if k in ("CPU", "GPU")} for spec in outer.bundle_specs[1:]]
        wanted = [dict(b.resources) for b in self.bundles]
        if held != wanted:
            raise ClusterError(f"the placement group of this trial holds {held} after its own bundle, not {wanted}")
        self.group = outer
