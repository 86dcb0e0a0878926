"""``dvpo train``: run a config, from the base model to the summary."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from actors.cluster.connect import connected, on_cluster, plan_fit
from actors.rollouts.engines import WarmEngines
from dvpo_service import loop, terminal
from dvpo_service.commands.assemble import Pools, assemble, recovery_of, start_pools
from dvpo_service.commands.check_plugins import check_plugins
from dvpo_service.commands.check_rollouts import check_rollouts
from dvpo_service.commands.in_process import assemble_here
from dvpo_service.commands.plan import check_adapters, check_capacity
from dvpo_service.commands.resume import open_tracker, restore, resume_point
from dvpo_service.commands.summary import plan_facts, summarize
from dvpo_service.commands.warmstart import base_model, is_made
from dvpo_service.config import Config
from dvpo_service.data.splits import Data, load_data
from dvpo_service.export.export import CRITIC, describe, writing
from dvpo_service.export.states import EXPORT_FILE, POLICY
from dvpo_service.host.stopping import Stopped, Stopping
from dvpo_service.models.base import save_base
from dvpo_service.models.load import check_model, load_tokenizer
from dvpo_service.roles import Display
from dvpo_service.runs.checkpoint import Checkpoint, Checkpoints
from dvpo_service.runs.directory import RunDir
from dvpo_service.runs.lock import locked
from dvpo_service.runs.remote_checkpoint import checkpoints_of
from dvpo_service.runs.settings import record_settings
from dvpo_service.runs.storage import StoragePath, remove_marked, written_locally
from dvpo_service.tracking.tracker import Tracker


def train(
    config: Config, run_dir: StoragePath, *, watch: Display | None = None, warm: WarmEngines | None = None
) -> dict[str, Any]:
    """Run a config to its end, from the newest checkpoint in ``run_dir`` if there is one.

    The user's mistakes are found before anything takes time: plugins, data, model, plan, checkpoint and tracking
    store are checked first.

    Args:
      watch: shows the progress in place of the terminal; a trial of a sweep gives one.
      warm: keeps the engines running for the next run in this process; a trial of a sweep gives one.

    Returns:
      The summary that is also in ``run_dir/summary.json``.

    Raises:
      UserError: something that the user can fix, in one line.
      PoolError: a pool failed for good.
      Stopped: the run was asked to stop; its checkpoint is written.
    """
    run = RunDir(run_dir)
    with locked(run.local), on_cluster(config), ExitStack() as on_error:
        if warm:
            on_error.callback(warm.drop)
        raw = _check(config, quiet=watch is not None)
        run.open()
        checkpoints = checkpoints_of(run, keep=config.trainer.keep_checkpoints)
        resume = resume_point(config, raw, checkpoints)
        done = resume.record["state"]["step"] if resume else 0
        display = watch or terminal.TrainingDisplay(config.trainer.num_steps, start=done)
        tracker = open_tracker(config, run.local, resume, display)
        try:
            summary = _run(config, run, raw, checkpoints, resume, display, tracker, warm)
            tracker.finish("FINISHED", summary)
        except (KeyboardInterrupt, Stopped):
            tracker.finish("KILLED", None)
            raise
        except BaseException:
            tracker.finish("FAILED", None)
            raise
        on_error.pop_all()  # keep the engines warm after a run that ended well
    if watch is None:
        terminal.closing(summary, run.location, tracker.tracking_uri)
    return summary


def _check(config: Config, *, quiet: bool) -> Data:
    """Check everything that can be checked before actors start, and return the data."""
    if not quiet:
        terminal.warn_of(config)
    check_plugins(config)
    data = load_data(config.data)
    check_rollouts(config, data)
    check_model(config.model.path, config.max_model_len, trust_remote_code=config.model.trust_remote_code)
    check_adapters(config)
    plan_fit(config)
    check_capacity(config)
    return data


def _run(
    config: Config,
    run: RunDir,
    raw: Data,
    checkpoints: Checkpoints,
    resume: Checkpoint | None,
    display: Display,
    tracker: Tracker,
    warm: WarmEngines | None,
) -> dict[str, Any]:
    """Start the pools, train and export. Return the summary."""
    started = time.time()
    trust = config.model.trust_remote_code
    with Stopping(display.status).listening() as stopping, ExitStack() as stack:
        model_path = _base_model(config, raw, run, stack)
        tokenizer = load_tokenizer(model_path, trust_remote_code=trust)
        save_base(model_path, run.local, trust_remote_code=trust)
        data = raw.encoded(config.data, tokenizer)
        if isinstance(display, terminal.TrainingDisplay):
            terminal.show_plan(config, plan_facts(model_path, data, run.location, resume))
        stack.enter_context(display)
        pools: Pools | None = None
        if config.cluster.in_process:
            roles = assemble_here(config, model_path, data, tokenizer, tracker, run.local, stack)
        else:
            display.status("starting engines and trainers")
            pools = start_pools(config, model_path, stack, display.note, warm=warm, run_dir=run.location)
            roles = assemble(config, data, tokenizer, pools, tracker, run.local)
        stack.callback(roles.stream.close)
        recovery = recovery_of(config, roles, pools, checkpoints, display.note)
        state = restore(roles, resume)
        # Not before everything has started: these are the settings that were trained with.
        if changed := record_settings(run.local, config, state.step):
            display.note(f"continues at step {state.step} with other settings: {'; '.join(changed)}")
        display.status("")
        with checkpoints.finish_on_error():
            for attempt in recovery.attempts(state):
                with attempt:
                    state = loop.train(config, roles, checkpoints, attempt.state, stopping)
        display.status("exporting policy and critic")
        export_final(config, roles, run, state.step)
        summary = summarize(config, state, run, tracker, time.time() - started)
        run.mirror()
    return summary


def _base_model(config: Config, raw: Data, run: RunDir, stack: ExitStack) -> str:
    """Return the path of the model to start from, connected to the cluster until ``stack`` closes.

    A run in one process needs a cluster only to make a base model, and only until it is made.
    """
    runs = run.local.parent
    if not config.cluster.in_process:
        stack.enter_context(connected(config))
        return base_model(config, raw.train, runs)
    with nullcontext() if is_made(config, runs) else connected(config):
        return base_model(config, raw.train, runs)


def export_final(config: Config, roles: loop.Roles, run: RunDir, step: int) -> None:
    """Write the trained policy, critic and model card to the run's ``policy/``."""
    target = run.location / POLICY
    if isinstance(target, Path):
        with writing(target, own=True) as folder:
            roles.policy.export(folder)
            roles.estimator.export(folder / CRITIC)
            describe(folder, run.local, config, step, roles.tracker.run_id)
        return
    # An object store cannot rename. EXPORT_FILE makes the folder an export: it is removed first and written last, with
    # an id of its own, so that a reader who finds the same file before and after has read one whole export.
    remove_marked(target, EXPORT_FILE)
    roles.policy.export(target)
    roles.estimator.export(target / CRITIC)
    run_id, upload = roles.tracker.run_id, uuid.uuid4().hex
    with written_locally(str(target), last=EXPORT_FILE) as local:
        describe(Path(local), run.local, config, step, run_id, critic=config.algorithm.has_critic, upload=upload)
