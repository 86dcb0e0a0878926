"""Start the actors of a run, and assign them to the roles that the loop talks to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from actors.cluster.model_broadcast import broadcast_model, broadcast_to_spares, check_shared
from actors.cluster.placement import Placement, plan_bundles
from actors.cluster.supervisor import restart_budget
from actors.rollouts.ahead import AheadStream
from actors.rollouts.engines import EnginePool, WarmEngines
from actors.rollouts.evaluation import HeldOutEvaluator
from actors.rollouts.reward_pool import RewardPool
from actors.rollouts.stream import SyncStream
from actors.training.rank_pool import RankPool, SharedBatch
from actors.training.recovery import GroupRestarts, Recovery
from actors.training.roles import CriticEstimator, PolicyRanks, engine_mismatch
from actors.weights.check import EngineCheck
from actors.weights.sync import SyncedEngines
from actors.weights.transfer import weight_backend
from dvpo_service import loop
from dvpo_service.commands.resume import restore
from dvpo_service.config import Backend, Config
from dvpo_service.data.ledger import Ledger
from dvpo_service.data.splits import Data
from dvpo_service.estimators.group import GroupEstimator
from dvpo_service.roles import Observer, Tracker
from dvpo_service.runs.checkpoint import Checkpoints
from dvpo_service.runs.storage import StoragePath
from dvpo_service.tracking.observe import Distributions, FanObserver, NoPictures

Note = Callable[[str], None]


@dataclass
class Pools:
    """Every actor of a run.

    Attributes:
      restarts: counts the restarts of trainer groups, and bounds them.
      keep_engines: leave the engines running at ``shutdown``, for the next run in this process.
    """

    placement: Placement
    policy: PolicyRanks
    critic: CriticEstimator | None  # None where the estimator compares samples instead
    engines: EnginePool
    rewards: RewardPool
    backend: Backend
    restarts: GroupRestarts
    keep_engines: bool = False

    @property
    def trainers(self) -> dict[str, RankPool]:
        """The pools of trainer ranks by name."""
        return trainer_groups(self.policy, self.critic)

    def shutdown(self) -> None:
        """End every process that this run started. If one pool fails to shut down, the others still do."""
        with ExitStack() as stack:
            stack.callback(self.placement.release)
            stack.callback(self.rewards.shutdown)
            for group in self.trainers.values():
                stack.callback(group.shutdown)
            if not self.keep_engines:
                stack.callback(self.engines.shutdown)


def start_pools(
    config: Config,
    model_path: str,
    stack: ExitStack,
    note: Note,
    *,
    warm: WarmEngines | None = None,
    run_dir: StoragePath | None = None,
) -> Pools:
    """Start every actor of a run, and return when all of them are ready.

    Args:
      stack: shuts the actors down when it closes, also after a failed start.
      note: called with one line of text for each restart.
      warm: provides the engines and keeps them running for the next run.
      run_dir: checked to be visible from every node.

    Raises:
      ClusterError: the cluster has no room for the plan, or a node does not see the model or the run directory.
      PoolError: an actor does not start.
    """
    placement = Placement(plan_bundles(config), timeout_s=config.cluster.placement_timeout_s)
    if run_dir is not None:
        check_shared(run_dir, placement.nodes())
    broadcast_model(model_path, placement.nodes())
    broadcast_to_spares(model_path, placement.nodes())
    backend = weight_backend(config)
    batch = SharedBatch()
    policy = PolicyRanks(config, model_path, placement, batch)
    critic = CriticEstimator(config, model_path, placement, batch) if config.algorithm.has_critic else None
    engines = (warm.acquire if warm else EnginePool.spawn)(config, model_path, backend, placement, note)
    pools = Pools(
        placement=placement,
        policy=policy,
        critic=critic,
        engines=engines,
        rewards=RewardPool(config.reward, placement, note),
        backend=backend,
        restarts=GroupRestarts(list(trainer_groups(policy, critic)), restart_budget(config.cluster)),
        keep_engines=warm is not None,
    )
    stack.callback(pools.shutdown)
    engines.supervisor.start()
    starting = [group.setup() for group in pools.trainers.values()]
    for call in starting:
        call.result()
    pools.rewards.wait_ready(config.rollout.start_timeout_s)
    engines.supervisor.wait_started()
    return pools


def trainer_groups(policy: PolicyRanks, critic: CriticEstimator | None) -> dict[str, RankPool]:
    """Return the pools of trainer ranks by name."""
    return {p.ranks.name: p.ranks for p in (policy, critic) if p}


def assemble(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, pools: Pools, tracker: Tracker, run_dir: Path
) -> loop.Roles:
    """Return the pools in the roles that the loop talks to."""
    check = EngineCheck(config, data.train.prompts, pools.policy.score)
    weights = SyncedEngines(config, pools.engines, pools.backend, pools.policy.send_weights, check)
    stream = AheadStream if config.rollout.max_staleness else SyncStream

    def health() -> dict[str, float]:
        return pools.engines.supervisor.metrics() | pools.rewards.metrics() | pools.restarts.metrics()

    return loop.Roles(
        stream=stream(config, data.train, weights, pools.rewards, Ledger(run_dir / "ledger.jsonl")),
        policy=pools.policy,
        estimator=pools.critic or GroupEstimator(config.algorithm),
        weights=weights,
        evaluator=HeldOutEvaluator(config, data.held_out, weights, pools.rewards),
        observer=observer(config, data, tokenizer, pools.critic, tracker),
        tracker=tracker,
        mismatch=engine_mismatch,
        health=health,
    )


def recovery_of(
    config: Config, roles: loop.Roles, pools: Pools | None, checkpoints: Checkpoints, note: Note
) -> Recovery:
    """Return the recovery of a run that is about to begin.

    When trainer ranks are lost, it restores the run from the last checkpoint, or from the start if there is none.
    Without pools there is nothing to lose.
    """
    trainers = pools.trainers if pools else {}
    restarts = pools.restarts if pools else GroupRestarts([], restart_budget(config.cluster))
    start = roles.stream.state_dict()

    def last_checkpoint() -> tuple[int | None, Callable[[], loop.TrainState]]:
        checkpoint = checkpoints.latest(note)

        def bring_back() -> loop.TrainState:
            if checkpoint is None:
                roles.stream.load_state_dict(start)
            state = restore(roles, checkpoint)
            roles.tracker.rewind(state.step + 1 if checkpoint else 0)
            return state

        return checkpoint.record["state"]["step"] if checkpoint else None, bring_back

    location = checkpoints.folder.parent
    command = f"dvpo train --config {checkpoints.run_dir / 'config.yaml'} --run-dir {location}"
    return Recovery(trainers, last_checkpoint, restarts, note, command)


def observer(
    config: Config,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    critic: Distributions | None,
    tracker: Tracker,
) -> Observer:
    """Return what draws the critic; nothing is drawn of a critic without distributions, or where there is none."""
    if critic is None or not config.algorithm.traits.distributional:
        return NoPictures()
    first = next(iter(data.held_out.values()))
    shown = list(first.prompts[: config.tracking.fan_prompts])
    return FanObserver(shown, tokenizer, critic, tracker, config.rollout.max_new_tokens)
