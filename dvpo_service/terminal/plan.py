"""The plan of a run, printed before it starts: what will run, and the arithmetic of its batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dvpo_service.config.algorithm import AlgorithmConfig
from dvpo_service.config.pools import TrainerPool
from dvpo_service.config.rollouts import RolloutConfig
from dvpo_service.config.schema import ClusterConfig, Config
from dvpo_service.host.secrets import mask_uri
from dvpo_service.terminal.console import make_console


def show_plan(config: Config, facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Print pools, devices, batch arithmetic, model, data, and where the results will be.

    Args:
      config: the run's config.
      facts: what only the launcher knows, each optional: ``model`` (a path), ``parameters`` (their number),
        ``train_prompts`` (their number), ``val_prompts`` (their number by split), ``run_dir``, ``tracking_uri``,
        ``resumed_from`` (a step). Any other key is shown under its own name.
      console: by default standard output.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in (_plan_rows(config) | _fact_rows(facts)).items():
        grid.add_row(name, Text(value))
    title = Text(f" {config.name}: the plan ", style="bold")
    (console or make_console()).print(Panel(grid, title=title, title_align="left", border_style="dim"))


def _plan_rows(config: Config) -> dict[str, str]:
    r = config.rollout
    a = config.algorithm
    t = config.trainer
    w = config.reward
    cluster = config.cluster
    track = config.tracking
    return {
        "model": _model_words(config),
        "algorithm": _algorithm_words(a),
        "rollout": _rollout_words(r, cluster) + "; " + _staleness_words(r),
        "reward": f"{_count(w.num_workers, 'worker')}, CPU, {w.words}, noise: {w.noise_words}",
        "critic": _pool_words(config.critic, config.batch_size, cluster.gpus_per_trainer) if a.has_critic else "none",
        "policy": _pool_words(config.policy, config.batch_size, cluster.gpus_per_trainer),
        "batch": f"{r.prompts_per_step} prompts x {r.n} = {config.batch_size} responses a step, "
        f"each up to {r.max_new_tokens} tokens",
        "steps": f"{t.num_steps}, {_every('evaluation', t.eval_every)}, {_every('checkpoint', t.save_every)}",
        "tracking": "metrics.jsonl" + (f", MLflow experiment {track.experiment}" if track.mlflow else ""),
    }


def _rollout_words(r: RolloutConfig, cluster: ClusterConfig) -> str:
    if cluster.in_process:
        return "by transformers, with everything in this process"
    engines = f"{_count(r.num_engines, _engine_words(r))}, tensor parallel {r.tensor_parallel_size}"
    return f"{engines}, {_device(cluster.gpus_per_engine)}"


def _staleness_words(r: RolloutConfig) -> str:
    if not r.max_staleness:
        return "on-policy"
    return f"ahead of the trainers by up to {_count(r.max_staleness, 'update')}, importance correction: {r.correction}"


def _engine_words(r: RolloutConfig) -> str:
    return "vLLM engine" if r.engine == "vllm" else f"{r.engine} engine"


def _algorithm_words(a: AlgorithmConfig) -> str:
    if a.traits.distributional:
        critic = f"critic of {a.n_heads} heads x {a.n_quantiles} quantiles"
        return f"{a.adv_estimator} ({a.form} form), {critic}, {a.advantage} advantage"
    return a.adv_estimator + (", scalar critic" if a.has_critic else "")


def _pool_words(pool: TrainerPool, batch: int, gpus: float) -> str:
    mini = pool.mini_batch_size or batch
    steps = pool.epochs * (batch // mini)
    budget = pool.max_tokens_per_micro_batch
    micro = f"{pool.micro_batch_size}" + (f" or {budget:,} tokens" if budget else "")
    return (
        f"{_count(pool.world_size, 'FSDP2 rank')}, {_device(gpus)}; "
        f"{_count(steps, 'optimizer step')} a step: {_count(pool.epochs, 'epoch')}, "
        f"mini-batches of {mini}, micro-batches of {micro} a rank"
    )


def _fact_rows(given: Mapping[str, Any]) -> dict[str, str]:
    facts = dict(given)
    rows: dict[str, str] = {}
    if "model" in facts:
        rows["model"] = str(facts.pop("model"))
    if "parameters" in facts:
        rows["parameters"] = _number(facts.pop("parameters"))
    sizes = [f"train {_number(facts.pop('train_prompts'))}"] if "train_prompts" in facts else []
    sizes += [f"{split} {_number(size)}" for split, size in facts.pop("val_prompts", {}).items()]
    if sizes:
        rows["prompts"] = ", ".join(sizes)
    if facts.get("resumed_from") is not None:
        rows["resumes"] = f"at step {facts['resumed_from']}"
    if "run_dir" in facts:
        rows["results"] = str(facts["run_dir"])
    if facts.get("tracking_uri"):
        rows["MLflow"] = mask_uri(str(facts["tracking_uri"]))
    shown = {"resumed_from", "run_dir", "tracking_uri"}
    return rows | {key.replace("_", " "): _number(v) for key, v in facts.items() if key not in shown}


def _model_words(config: Config) -> str:
    w = config.model.warmstart
    if w is None:
        return str(config.model.path)
    return f"made here: {w.num_layers} layers, hidden size {w.hidden_size}, {w.steps} supervised steps"


def _every(what: str, steps: int) -> str:
    return f"{what} every {steps}" if steps else f"no {what} in between"


def _device(gpus: float) -> str:
    return f"{gpus:g} GPU each" if gpus else "CPU"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
