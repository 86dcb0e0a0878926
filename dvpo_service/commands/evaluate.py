"""``dvpo eval``: measure how well a model answers, with the engines and rewards of a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from actors.cluster.connect import connected
from actors.cluster.placement import Placement, plan_bundles
from actors.rollouts.engines import EnginePool
from actors.rollouts.evaluation import HeldOutEvaluator
from actors.rollouts.reward_pool import RewardPool
from actors.weights.transfer import weight_backend
from dvpo_service.commands.check_rollouts import check_rows
from dvpo_service.commands.in_process import evaluator_here
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.splits import encode, load_data, load_files
from dvpo_service.eval_stats import PromptScores, by_group
from dvpo_service.export.export import export
from dvpo_service.export.states import is_export, newest
from dvpo_service.models.load import check_model, load_tokenizer
from dvpo_service.terminal import Bar, make_console, progress, warn_of

# What the table says of its intervals, by ``ci95_method``.
INTERVALS = {
    "wilson": "Wilson's interval over prompts (rewards of 0 and 1)",
    "student_t": "Student's t over prompts, within 0 and 1 where the rewards are",
}


@dataclass(frozen=True)
class Subject:
    """The model to evaluate, and the config to evaluate it with.

    Attributes:
      model: Hugging Face folder or hub name.
      name: what tables and results call the model.
      step: number of updates that the policy has been trained for; None if unknown.
    """

    config: Config
    model: str
    name: str
    step: int | None = None


@contextmanager
def from_run(source: Path, name: str, config: Config) -> Iterator[Subject]:
    """Yield the newest state of a run, a checkpoint or an export.

    A checkpoint is first exported to a temporary folder beside it, where every node sees the export. The folder is
    removed at the end of the block.

    Args:
      source: folder of the run, checkpoint or export.
      name: what tables and results call the model.
      config: the run's config, with overrides (``states.config_of``).
    """
    step, state = newest(source)
    with ExitStack() as stack:
        folder = state
        if not is_export(state):
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix=".eval-", dir=state.parent))
            folder = export(state, Path(work) / "policy").folder
        yield Subject(config, str(folder), name, step)


def evaluate(subject: Subject, files: Sequence[str], n: int, output: Path | None) -> dict[str, Any]:
    """Sample every prompt n times and once greedily. Print tables, and write JSON to ``output`` if it is given.

    Args:
      files: data files to evaluate in place of the config's splits; each is a split named after the file.

    Returns:
      The results, as in the JSON file.
    """
    config = subject.config
    warn_of(config)
    check_model(subject.model, config.max_model_len, trust_remote_code=config.model.trust_remote_code)
    data = load_files(config.data, files) if files else load_data(config.data).held_out
    with progress(f"evaluating {subject.name}", sum(map(len, data.values()))) as bar:
        scores = measure(config, subject.model, data, n, bar)
    sampling = {"n": n, "temperature": config.rollout.temperature, "seed": config.trainer.seed}
    results = {"model": subject.name, "step": subject.step, **sampling, **by_group(scores, n)}
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    return results


def measure(config: Config, model: str, data: Mapping[str, Dataset], n: int, bar: Bar) -> list[PromptScores]:
    """Return the scores of ``model`` on ``data``. Only engines and reward workers are started for it, or nothing.

    Args:
      data: splits by name.
      n: samples for each prompt.
      bar: shows the stage of the start, then the number of prompts done.
    """
    check_rows(config.reward, data.values())
    tokenizer = load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
    splits = {name: encode(config.data, split, tokenizer) for name, split in data.items()}
    if config.cluster.in_process:
        return evaluator_here(config, model, tokenizer, splits).measure(n, bar.update)
    bar.stage("starting Ray")
    with connected(config), ExitStack() as stack:
        bundles = [b for b in plan_bundles(config) if b.pool.startswith(("rollout", "reward"))]
        placement = Placement(bundles, timeout_s=config.cluster.placement_timeout_s)
        stack.callback(placement.release)
        folder = str(Path(model).absolute()) if Path(model).exists() else model  # actors have other working directories
        bar.stage(f"starting {config.rollout.num_engines} {config.rollout.engine} engine(s) with {model}")
        engines = EnginePool.spawn(config, folder, weight_backend(config), placement)
        stack.callback(engines.shutdown)
        rewards = RewardPool(config.reward, placement)
        stack.callback(rewards.shutdown)
        engines.supervisor.start()
        engines.supervisor.wait_started()
        bar.stage("")
        return HeldOutEvaluator(config, splits, engines, rewards).measure(n, bar.update)


def show(found: Mapping[str, Any]) -> None:
    """Print a table by split, and one by data source if the sources differ from the splits."""
    console = make_console()
    after = "" if found["step"] is None else f" after {found['step']} updates"
    console.print(f"{found['model']}{after}: {found['n']} samples a prompt at temperature {found['temperature']:g}")
    console.print(_table("split", found["splits"]))
    if found["sources"].keys() != found["splits"].keys():
        console.print(_table("source", found["sources"]))
    methods = {g["ci95_method"] for g in (*found["splits"].values(), *found["sources"].values())} - {None}
    if methods:
        console.print(f"95%: {' and '.join(INTERVALS[m] for m in sorted(methods))}")


def _table(title: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    passes = list(next(iter(groups.values()))["pass_at_k"])
    table = Table()
    mean = "mean reward" if any(g["graded"] for g in groups.values()) else "accuracy"
    for column in (title, "prompts", mean, "95%", "sd in prompt", "greedy", *(f"pass@{k}" for k in passes)):
        table.add_column(column, justify="left" if column == title else "right")
    for name, g in groups.items():
        interval = "-" if g["ci95"] is None else f"{g['ci95'][0]:.3f} to {g['ci95'][1]:.3f}"
        figures = [_number(g[key]) for key in ("sd_within_prompt", "greedy")]
        failed = f" ({g['failed']} failed)" if g["failed"] else ""
        table.add_row(
            name,
            f"{g['prompts']}{failed}",
            _number(g["accuracy"]),
            interval,
            *figures,
            *(_number(g["pass_at_k"][k]) for k in passes),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
