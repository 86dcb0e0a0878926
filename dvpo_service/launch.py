"""A config becomes a run: base model, pools, loop, results. The one place that knows every part."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from transformers import PreTrainedTokenizerBase

from actors.critic import CriticWorker
from actors.engines import EnginePool
from actors.evaluation import HeldOut
from actors.placement import Placement, alive_nodes, check_plan, local_cpus, local_gpus, plan_bundles
from actors.policy import PolicyWorker
from actors.pool import Call, RankPool
from actors.reward_pool import RewardPool
from actors.stream import SyncStream
from actors.trainers import CriticEstimator, PolicyPool, engine_mismatch
from actors.weight_sync import WeightSync
from actors.weight_transfer import Backend
from dvpo_service import loop, terminal
from dvpo_service.checkpoint import Checkpoint, Checkpoints
from dvpo_service.config import Config, to_yaml
from dvpo_service.data import splits
from dvpo_service.data.dataset import Dataset
from dvpo_service.errors import CheckpointError, ClusterError
from dvpo_service.models.load import check_context, check_model_folder, load_tokenizer
from dvpo_service.observe import FanObserver
from dvpo_service.rewards.scoring import resolve
from dvpo_service.tracking.masking import mask_uri
from dvpo_service.tracking.tracker import Tracker
from dvpo_service.warmstart import base_model_folder, make_base_model

log = logging.getLogger(__name__)


@dataclass
class Data:
    train: Dataset
    held_out: dict[str, Dataset]

    def encoded(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
        data = config.data
        return Data(
            splits.encode(data, self.train, tokenizer),
            {name: splits.encode(data, d, tokenizer) for name, d in self.held_out.items()},
        )


@dataclass
class Pools:
    """Every actor of a run."""

    placement: Placement
    policy: RankPool
    critic: RankPool
    engines: EnginePool
    rewards: RewardPool
    backend: Backend
    starting: list[Call] = field(default_factory=list)

    def shutdown(self) -> None:
        """End every process that this run started; one that fails to end does not keep the others."""
        with ExitStack() as stack:
            stack.callback(self.placement.release)
            for pool in (self.rewards, self.critic, self.policy, self.engines):
                stack.callback(pool.shutdown)


def train(config: Config, run_dir: Path) -> dict[str, Any]:
    """Run a config to its end, from the newest checkpoint in ``run_dir`` if there is one.

    Returns the summary that is also in ``run_dir/summary.json``.
    """
    started = time.time()
    run_dir.mkdir(parents=True, exist_ok=True)
    resolve(config.reward.function)
    raw = load_data(config)
    checkpoints = Checkpoints(run_dir, keep=config.trainer.keep_checkpoints)
    resume = resume_point(config, checkpoints)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    with connected(config), ExitStack() as stack:
        model_path = base_model(config, raw, run_dir.parent)
        tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
        data = raw.encoded(config, tokenizer)
        terminal.show_plan(config, plan_facts(model_path, data, run_dir, resume))
        display = stack.enter_context(
            terminal.TrainingDisplay(config.trainer.num_steps, start=resume.record["state"]["step"] if resume else 0)
        )
        tracker = open_tracker(config, run_dir, resume, display)
        try:
            display.status("starting engines and trainers")
            pools = start_pools(config, model_path)
            stack.callback(pools.shutdown)
            for call in pools.starting:
                call.result()
            roles = assemble(config, data, tokenizer, pools, tracker)
            state = restore(roles, resume)
            display.status("")
            state = loop.train(config.trainer, roles, checkpoints, state)
            display.status("exporting the policy")
            roles.policy.export(run_dir / "policy")
            summary = summarize(config, state, run_dir, tracker, time.time() - started)
            tracker.finish("FINISHED", summary)
        except KeyboardInterrupt:
            tracker.finish("KILLED", None)
            raise
        except BaseException:
            tracker.finish("FAILED", None)
            raise
    terminal.closing(summary, run_dir, tracker.tracking_uri)
    return summary


def load_data(config: Config) -> Data:
    train_data = splits.load_train(config.data)
    return Data(train_data, splits.load_splits(config.data, seen=train_data.keys()))


def base_model(config: Config, data: Data, runs: Path) -> str:
    """Path of the model to start from; made here, and cached, when the config asks for a warm start."""
    if config.model.path is not None:
        check_model_folder(config.model.path)
        check_context(config.model.path, config.max_model_len, trust_remote_code=config.model.trust_remote_code)
        return config.model.path
    warm = config.model.warmstart
    assert warm is not None
    folder = base_model_folder(config, runs / "base-models")
    if not folder.exists():
        with terminal.progress("warm start of the base model", warm.steps) as advance:
            make_base_model(
                config,
                folder.absolute(),
                lambda tokenizer: splits.encode(config.data, data.train, tokenizer).prompts,
                lambda step, loss: advance.update(step, loss=loss),
            )
    return str(folder.absolute())


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """A Ray cluster for the run: the one at ``cluster.address``, or one started here and ended after."""
    environment = {
        # Several processes share the cores: threads that spin while they wait would starve the others.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_ENABLE_V2": "1",
    }
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.cluster.address
    local: dict[str, Any] = (
        {}
        if address
        else {
            "num_cpus": config.cluster.num_cpus or local_cpus(plan_bundles(config)),
            "include_dashboard": False,
        }
    )
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            log_to_driver=bool(os.environ.get("DVPO_ACTOR_LOGS")),
            logging_level=logging.ERROR,
            **local,
        )
    except (ConnectionError, OSError, ValueError) as error:
        raise ClusterError(
            f"cannot connect to Ray at {address or 'this machine'}: {' '.join(str(error).split())[:200]}. "
            "Start a cluster with `ray start --head`, or leave cluster.address out to start one here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def weight_backend(config: Config) -> Backend:
    if config.rollout.weight_transfer != "auto":
        return config.rollout.weight_transfer
    return "nccl" if config.cluster.gpus_per_engine > 0 else "safetensors"


def start_pools(config: Config, model_path: str) -> Pools:
    """Spawn every actor; ``Pools.starting`` are the calls that make them ready."""
    placement = Placement(plan_bundles(config), timeout_s=config.cluster.placement_timeout_s)
    backend = weight_backend(config)
    pools = Pools(
        placement=placement,
        policy=RankPool.spawn("policy", config.policy.world_size, placement, timeout_s=config.policy.step_timeout_s),
        critic=RankPool.spawn("critic", config.critic.world_size, placement, timeout_s=config.critic.step_timeout_s),
        engines=EnginePool.spawn(config, model_path, backend, placement),
        rewards=RewardPool(config.reward, placement),
        backend=backend,
    )
    pools.starting = [
        pools.engines.submit("start", timeout_s=config.rollout.start_timeout_s),
        pools.policy.setup(PolicyWorker, config, model_path),
        pools.critic.setup(CriticWorker, config, model_path),
    ]
    return pools


def assemble(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, pools: Pools, tracker: Tracker
) -> loop.Roles:
    """Pools in the roles that the loop talks to."""
    critic = CriticEstimator(config, pools.critic)
    first = next(iter(data.held_out.values()))
    return loop.Roles(
        stream=SyncStream(config, data.train, pools.engines, pools.rewards),
        policy=PolicyPool(config, pools.policy),
        estimator=critic,
        weights=WeightSync(config, pools.policy, pools.engines, pools.backend),
        evaluator=HeldOut(config, data.held_out, pools.engines, pools.rewards),
        observer=FanObserver(list(first.prompts[: config.tracking.fan_prompts]), tokenizer, critic, tracker),
        tracker=tracker,
        mismatch=engine_mismatch,
    )


def resume_point(config: Config, checkpoints: Checkpoints) -> Checkpoint | None:
    if config.trainer.resume == "never":
        return None
    found = checkpoints.latest()
    if found and found.record["state"]["step"] > config.trainer.num_steps:
        raise CheckpointError(
            f"{found.folder} is at step {found.record['state']['step']}, beyond trainer.num_steps = "
            f"{config.trainer.num_steps}; raise num_steps, choose another --run-dir, or give trainer.resume=never"
        )
    return found


def restore(roles: loop.Roles, resume: Checkpoint | None) -> loop.TrainState:
    if resume is None:
        return loop.TrainState()
    roles.policy.load(resume.folder / "policy")
    roles.estimator.load(resume.folder / "estimator")
    roles.stream.load_state_dict(resume.record["stream"])
    return loop.TrainState(**resume.record["state"])


def open_tracker(
    config: Config, run_dir: Path, resume: Checkpoint | None, display: terminal.TrainingDisplay
) -> Tracker:
    if resume is None:
        return Tracker(run_dir, config, display=display)
    step = resume.record["state"]["step"]
    run_id = resume.record["mlflow_run_id"]
    return Tracker(run_dir, config, run_id=run_id, resume_step=step + 1, display=display)


def plan_facts(model_path: str, data: Data, run_dir: Path, resume: Checkpoint | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": model_path,
        "training prompts": len(data.train),
        "held-out prompts": {name: len(d) for name, d in data.held_out.items()},
        "run directory": str(run_dir),
    }
    if skipped := data.train.skipped:
        facts["training rows skipped"] = skipped
    if resume:
        facts["continues"] = f"from step {resume.record['state']['step']}"
    return facts


def summarize(
    config: Config, state: loop.TrainState, run_dir: Path, tracker: Tracker, seconds: float
) -> dict[str, Any]:
    """``summary.json``: accuracy by split before and after, and where everything is."""

    def by_split(metrics: dict[str, float], name: str) -> dict[str, float]:
        return {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith(f"/{name}")}

    summary = {
        "name": config.name,
        "steps": state.step,
        "seconds": round(seconds, 1),
        "training_seconds": round(state.seconds, 1),
        "held_out_before": by_split(state.before, "accuracy"),
        "held_out_after": by_split(state.after, "accuracy"),
        "held_out_greedy_before": by_split(state.before, "greedy"),
        "held_out_greedy_after": by_split(state.after, "greedy"),
        "where": {
            "run": str(run_dir),
            "policy": str(run_dir / "policy"),
            "metrics": str(run_dir / "metrics.jsonl"),
            "checkpoints": str(run_dir / "checkpoints"),
            "mlflow_tracking_uri": mask_uri(tracker.tracking_uri or ""),
            "mlflow_run_id": tracker.run_id or "",
        },
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def held_out_accuracy(config: Config, model: str, stack: ExitStack) -> tuple[dict[str, float], dict[str, int]]:
    """Accuracy of ``model`` on the config's splits, and the splits' sizes: engines and rewards only."""
    check_model_folder(model)
    data = load_data(config).encoded(config, load_tokenizer(model))
    bundles = [b for b in plan_bundles(config) if b.pool in ("rollout", "reward")]
    placement = Placement(bundles, timeout_s=config.cluster.placement_timeout_s)
    stack.callback(placement.release)
    engines = EnginePool.spawn(config, str(Path(model).absolute()), weight_backend(config), placement)
    stack.callback(engines.shutdown)
    rewards = RewardPool(config.reward, placement)
    stack.callback(rewards.shutdown)
    engines.call("start", timeout_s=config.rollout.start_timeout_s)
    metrics = HeldOut(config, data.held_out, engines, rewards).run(0)
    return metrics, {name: len(d) for name, d in data.held_out.items()}


def plan_fit(config: Config) -> str:
    """The plan in words. Raises ClusterError naming the actor that the cluster has no room for."""
    bundles = plan_bundles(config)
    if config.cluster.address is None:
        nodes = [{"CPU": float(config.cluster.num_cpus or local_cpus(bundles)), "GPU": float(local_gpus())}]
        check_plan(bundles, nodes)
    else:
        with connected(config):
            check_plan(bundles, alive_nodes())
    return ", ".join(str(b) for b in bundles)
