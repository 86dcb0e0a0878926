"""A config becomes a run: base model, pools, loop, results. The one place that knows every part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.ahead import AheadStream
from actors.cluster import connected, on_cluster, plan_fit
from actors.critic import CriticWorker
from actors.engines import EnginePool, WarmEngines
from actors.evaluation import HeldOut
from actors.placement import Placement, plan_bundles
from actors.policy import PolicyWorker
from actors.pool import RankPool
from actors.recovery import Recovery
from actors.reward_pool import RewardPool
from actors.spread import check_shared, spread_model, spread_to_spares
from actors.stream import SyncStream
from actors.trainers import CriticEstimator, PolicyPool, engine_mismatch
from actors.weight_sync import WeightSync
from actors.weight_transfer import Backend, weight_backend
from dvpo_service import loop, terminal
from dvpo_service.checkpoint import Checkpoints, checkpoints_of
from dvpo_service.config import Config, to_yaml
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.ledger import Ledger
from dvpo_service.data.splits import Data, check_sources, encode, load_data
from dvpo_service.estimators import GroupEstimator
from dvpo_service.eval_stats import PromptScores
from dvpo_service.export import CRITIC, EXPORT_FILE, POLICY, describe, writing
from dvpo_service.lock import locked
from dvpo_service.models.base import save_base
from dvpo_service.models.load import check_model, load_tokenizer
from dvpo_service.observe import FanObserver, NoPictures
from dvpo_service.resume import open_tracker, restore, resume_point
from dvpo_service.rewards.scoring import resolve
from dvpo_service.roles import Display, Observer
from dvpo_service.rundir import RunDir
from dvpo_service.stopping import Stopped, Stopping
from dvpo_service.storage import Place, written_locally
from dvpo_service.summary import plan_facts, summarize
from dvpo_service.tracking.tracker import Tracker
from dvpo_service.warmstart import base_model


@dataclass
class Pools:
    """Every actor of a run."""

    placement: Placement
    policy: RankPool
    critic: RankPool | None  # none where the estimator compares samples instead
    engines: EnginePool
    rewards: RewardPool
    backend: Backend
    keep_engines: bool = False

    @property
    def trainers(self) -> dict[str, RankPool]:
        return {p.name: p for p in (self.policy, self.critic) if p}

    def shutdown(self) -> None:
        """End every process that this run started; one that fails to end does not keep the others."""
        with ExitStack() as stack:
            stack.callback(self.placement.release)
            for pool in (self.rewards, self.critic, self.policy, self.engines):
                if pool and not (pool is self.engines and self.keep_engines):
                    stack.callback(pool.shutdown)


def train(
    config: Config, run_dir: Place, *, watch: Display | None = None, warm: WarmEngines | None = None
) -> dict[str, Any]:
    """Run a config to its end, from the newest checkpoint in ``run_dir`` if there is one.

    What a person may have got wrong is found before anything costs time: reward function, data,
    model, plan, checkpoint, tracking store.

    ``watch`` is told what happens in place of the terminal, and ``warm`` keeps the engines for the
    next run in this process: both for trials of a sweep.

    Returns the summary that is also in ``run_dir/summary.json``.
    """
    run = RunDir(run_dir)
    with locked(run.local), on_cluster(config):
        try:
            return _train(config, run, watch, warm)
        except BaseException:
            if warm:
                warm.drop()
            raise


def _train(config: Config, run: RunDir, watch: Display | None, warm: WarmEngines | None) -> dict[str, Any]:
    started, run_dir = time.time(), run.local
    if watch is None:
        terminal.warn_of(config)
    resolve(config.reward.function)
    raw = load_data(config.data)
    check_sources(config.reward, raw.train)
    check_model(config.model.path, config.max_model_len, trust_remote_code=config.model.trust_remote_code)
    plan_fit(config)
    run.open()
    checkpoints = checkpoints_of(run, keep=config.trainer.keep_checkpoints)
    resume = resume_point(config, checkpoints)
    done = resume.record["state"]["step"] if resume else 0
    display = watch or terminal.TrainingDisplay(config.trainer.num_steps, start=done)
    tracker = open_tracker(config, run_dir, resume, display)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    try:
        with Stopping(display.status).listening() as stopping, connected(config), ExitStack() as stack:
            model_path = base_model(config, raw.train, run_dir.parent)
            tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
            save_base(model_path, run_dir, trust_remote_code=config.model.trust_remote_code)
            data = raw.encoded(config.data, tokenizer)
            if watch is None:
                terminal.show_plan(config, plan_facts(model_path, data, run.place, resume))
            stack.enter_context(display)
            display.status("starting engines and trainers")
            pools = start_pools(config, model_path, stack, warm, run.place)
            roles = assemble(config, data, tokenizer, pools, tracker, run_dir)
            stack.callback(roles.stream.close)
            recovery = supervise(config, roles, pools, checkpoints, display)
            state = restore(roles, resume)
            display.status("")
            with checkpoints.settled():
                state = recovery.run(lambda s: loop.train(config.trainer, roles, checkpoints, s, stopping), state)
            display.status("exporting policy and critic")
            export_final(config, roles, run, state.step)
            summary = summarize(config, state, run, tracker, time.time() - started)
            run.mirror()
        tracker.finish("FINISHED", summary)
    except (KeyboardInterrupt, Stopped):
        tracker.finish("KILLED", None)
        raise
    except BaseException:
        tracker.finish("FAILED", None)
        raise
    if watch is None:
        terminal.closing(summary, run.place, tracker.tracking_uri)
    return summary


def start_pools(
    config: Config, model_path: str, stack: ExitStack, warm: WarmEngines | None = None, run_dir: Place | None = None
) -> Pools:
    """Spawn every actor and wait until all are ready; ``stack`` ends them, also when one does not start."""
    placement = Placement(plan_bundles(config), timeout_s=config.cluster.placement_timeout_s)
    if run_dir is not None:
        check_shared(run_dir, placement.nodes())
    spread_model(model_path, placement.nodes())
    spread_to_spares(model_path, placement.nodes())
    backend = weight_backend(config)
    pools = Pools(
        placement=placement,
        policy=RankPool("policy", config.policy.world_size, placement, timeout_s=config.policy.step_timeout_s),
        critic=RankPool("critic", config.critic.world_size, placement, timeout_s=config.critic.step_timeout_s)
        if config.algorithm.has_critic
        else None,
        engines=(warm.lend if warm else EnginePool.spawn)(config, model_path, backend, placement),
        rewards=RewardPool(config.reward, placement),
        backend=backend,
        keep_engines=warm is not None,
    )
    stack.callback(pools.shutdown)
    pools.engines.supervisor.start()
    starting = [
        pools.policy.setup(PolicyWorker, config, model_path),
    ]
    if pools.critic:
        starting.append(pools.critic.setup(CriticWorker, config, model_path))
    for call in starting:
        call.result()
    pools.rewards.wait_ready(config.rollout.start_timeout_s)
    pools.engines.supervisor.wait_started()
    return pools


def assemble(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, pools: Pools, tracker: Tracker, run_dir: Path
) -> loop.Roles:
    """Pools in the roles that the loop talks to."""
    estimator = CriticEstimator(config, pools.critic) if pools.critic else GroupEstimator(config.algorithm)
    first = next(iter(data.held_out.values()))
    observer: Observer = NoPictures()
    if isinstance(estimator, CriticEstimator) and config.algorithm.adv_estimator == "dvpo":
        shown = list(first.prompts[: config.tracking.fan_prompts])
        observer = FanObserver(shown, tokenizer, estimator, tracker, config.rollout.max_new_tokens)
    stream = AheadStream if config.rollout.max_staleness else SyncStream
    return loop.Roles(
        stream=stream(config, data.train, pools.engines, pools.rewards, Ledger(run_dir / "ledger.jsonl")),
        policy=PolicyPool(config, pools.policy),
        estimator=estimator,
        weights=WeightSync(config, pools.policy, pools.engines, pools.backend),
        evaluator=HeldOut(config, data.held_out, pools.engines, pools.rewards),
        observer=observer,
        tracker=tracker,
        mismatch=engine_mismatch,
        health=lambda: pools.engines.supervisor.metrics() | pools.rewards.metrics(),
    )


def supervise(config: Config, roles: loop.Roles, pools: Pools, checkpoints: Checkpoints, display: Display) -> Recovery:
    """What brings the run back when trainer ranks are lost; the display is told of every restart."""
    pools.engines.supervisor.note = pools.rewards.note = checkpoints.note = display.note
    return Recovery.of(config, roles, pools.trainers, checkpoints, partial(restore, roles), display.note)


def export_final(config: Config, roles: loop.Roles, run: RunDir, step: int) -> None:
    """The trained policy, critic and model card in the run's ``policy/``."""
    target = run.place / POLICY
    if isinstance(target, Path):
        with writing(target, own=True) as folder:
            roles.policy.export(folder)
            roles.estimator.export(folder / CRITIC)
            describe(folder, run.local, config, step, roles.tracker.run_id)
        return
    (target / EXPORT_FILE).unlink(missing_ok=True)  # without it the folder is no export, until the new one is whole
    roles.policy.export(target)
    roles.estimator.export(target / CRITIC)
    with written_locally(str(target)) as local:
        describe(Path(local), run.local, config, step, roles.tracker.run_id, critic=config.algorithm.has_critic)


def evaluate(
    config: Config, model: str, data: Mapping[str, Dataset], n: int, on_progress: Callable[[int], None]
) -> list[PromptScores]:
    """Scores of ``model`` on ``data``, splits by name: engines and rewards only. See ``HeldOut.measure``."""
    tokenizer = load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
    splits = {name: encode(config.data, split, tokenizer) for name, split in data.items()}
    with connected(config), ExitStack() as stack:
        bundles = [b for b in plan_bundles(config) if b.pool in ("rollout", "reward")]
        placement = Placement(bundles, timeout_s=config.cluster.placement_timeout_s)
        stack.callback(placement.release)
        engines = EnginePool.spawn(config, _here(model), weight_backend(config), placement)
        stack.callback(engines.shutdown)
        rewards = RewardPool(config.reward, placement)
        stack.callback(rewards.shutdown)
        engines.supervisor.start()
        engines.supervisor.wait_started()
        return HeldOut(config, splits, engines, rewards).measure(n, on_progress)


def _here(model: str) -> str:
    """A folder as actors elsewhere find it, a hub name as it is."""
    return str(Path(model).absolute()) if Path(model).exists() else model
