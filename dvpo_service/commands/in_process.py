"""A run or an evaluation in this process alone (``cluster.in_process``): the roles, without actors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from actors.cluster.pool import Rendezvous
from actors.in_process.roles import InProcessCritic, InProcessPolicy, InProcessRewards
from actors.in_process.sampler import InProcessEngine
from actors.rollouts.evaluation import HeldOutEvaluator
from actors.rollouts.stream import SyncStream
from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from actors.training.roles import engine_mismatch
from dvpo_service import loop
from dvpo_service.commands.assemble import observer
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.ledger import Ledger
from dvpo_service.data.splits import Data
from dvpo_service.estimators.group import GroupEstimator
from dvpo_service.host.network import free_port
from dvpo_service.models.load import load_causal_lm
from dvpo_service.roles import Tracker

LOOPBACK = "127.0.0.1"


def assemble_here(
    config: Config,
    model_path: str,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    tracker: Tracker,
    run_dir: Path,
    stack: ExitStack,
) -> loop.Roles:
    """Load policy and critic into this process, and return them in the roles that the loop talks to.

    Args:
      stack: leaves the process group of the two when it closes, so that another run can follow.
    """
    meet = Rendezvous(0, 1, LOOPBACK, free_port(), config.policy.step_timeout_s)
    stack.callback(_leave_group)
    policy = PolicyWorker(config, model_path, meet)
    critic = InProcessCritic(CriticWorker(config, model_path, meet)) if config.algorithm.has_critic else None
    engine = InProcessEngine(policy.trainer.module.backbone, tokenizer, config.rollout.max_num_seqs)
    rewards = InProcessRewards(config.reward)
    return loop.Roles(
        stream=SyncStream(config, data.train, engine, rewards, Ledger(run_dir / "ledger.jsonl")),
        policy=InProcessPolicy(policy),
        estimator=critic or GroupEstimator(config.algorithm),
        weights=engine,
        evaluator=HeldOutEvaluator(config, data.held_out, engine, rewards),
        observer=observer(config, data, tokenizer, critic, tracker),
        tracker=tracker,
        mismatch=engine_mismatch,
        health=dict,
    )


def evaluator_here(
    config: Config, model: str, tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, Dataset]
) -> HeldOutEvaluator:
    """Return what measures the model at ``model`` in this process."""
    lm: Any = load_causal_lm(model, trust_remote_code=config.model.trust_remote_code)
    lm.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = InProcessEngine(lm, tokenizer, config.rollout.max_num_seqs)
    return HeldOutEvaluator(config, splits, engine, InProcessRewards(config.reward))


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
