"""Export a run's policy and critic as folders that other programs load: ``dvpo export``, and the end of training.

An export is a Hugging Face folder of the policy, with ``critic/`` (``DistributionalCritic.from_pretrained``),
the run's ``config.yaml``, ``export.json`` (where it comes from), ``dvpo_check.json`` (log-probs of fixed sequences, to
hold engines against) and ``README.md`` (the model card). No Ray.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo_service.config import Config, to_yaml
from dvpo_service.errors import CheckpointError
from dvpo_service.estimators.base import critic_objective, critic_spec
from dvpo_service.export.model_card import model_card
from dvpo_service.export.states import EXPORT_FILE, is_export, newest, read_json, run_config, run_of, step_in
from dvpo_service.models.base import ORIGIN, base_folder, empty_backbone, empty_policy, origin
from dvpo_service.models.critic import DistributionalCritic
from dvpo_service.models.fixed_sequences import record
from dvpo_service.models.load import load_backbone, load_causal_lm, load_tokenizer
from dvpo_service.models.lora import add_adapter
from dvpo_service.models.policy_folder import write_policy
from dvpo_service.models.unshard import unshard
from dvpo_service.runs.integrity import Damaged, verify
from dvpo_service.runs.settings import CONFIG_FILE, settings_changes
from dvpo_service.runs.step_file import read_metrics
from dvpo_service.runs.storage import follow_umask
from dvpo_service.tracking.names import check_model_name
from dvpo_service.tracking.registry import register, registry_uri
from dvpo_service.tracking.store import open_store

CARD_FILE, CRITIC = "README.md", "critic"


@dataclass(frozen=True)
class Exported:
    """An export.

    Attributes:
      folder: loads with transformers and vLLM.
      critic: the critic's folder, or None when the run has no critic.
      config: the run's config, with its secrets masked.
      step: the number of updates done.
      mlflow_run_id: the run's id in MLflow, or None when it had no MLflow.
    """

    folder: Path
    critic: Path | None
    config: Config
    step: int
    mlflow_run_id: str | None = None


def open_export(folder: Path) -> Exported:
    """Return the export in ``folder``. Raises CheckpointError when the folder is not an export."""
    if not is_export(folder):
        raise CheckpointError(f"{folder} is no export: there is no {EXPORT_FILE} in it; make one with `dvpo export`")
    record = read_json(folder / EXPORT_FILE)
    critic = folder / CRITIC
    return Exported(
        folder,
        critic if critic.is_dir() else None,
        run_config(folder),
        step_in(record, folder / EXPORT_FILE),
        record.get("mlflow_run_id"),
    )


def export(source: Path, output: Path) -> Exported:
    """Export the newest state of ``source`` (see ``newest``) to ``output``.

    After an error, ``output`` is as it was before.

    Raises:
      CheckpointError: there is nothing to export; the checkpoint is torn, damaged or pruned; or ``output`` is a folder
        that is neither empty nor an export.
    """
    step, state = newest(source)
    if is_export(state):
        if output.exists() and output.samefile(state):
            return open_export(state)
        with writing(output) as folder:
            shutil.copytree(state, folder, dirs_exist_ok=True)
        return open_export(output)
    run_dir = run_of(state)
    config = run_config(run_dir)
    try:
        record = verify(state)
    except Damaged as damage:
        raise CheckpointError(
            f"checkpoint {state} is damaged: {damage}; export another checkpoint of the run"
        ) from damage
    with writing(output) as folder:
        _export_policy(state, run_dir, config, folder)
        if config.algorithm.has_critic:
            _export_critic(state, run_dir, config, folder / CRITIC)
        describe(folder, run_dir, config, step, record.get("mlflow_run_id"))
    return open_export(output)


def export_and_register(source: Path, output: Path, name: str | None) -> tuple[Exported, str | None]:
    """Export, and register the export as a new version of the model ``name`` in the run's MLflow.

    MLflow is contacted before the export, so that an unreachable server is reported at once.

    Returns:
      (the export, the version's number); the number is None without a ``name``, since nothing is registered then.

    Raises:
      CheckpointError: as ``export`` does.
      TrackingError: MLflow cannot be used, or takes no model of this name.
    """
    if name is None:
        return export(source, output), None
    check_model_name(name)
    run_dir = run_of(newest(source)[1])
    uri = registry_uri(run_config(run_dir), run_dir)
    client = open_store(uri)
    done = export(source, output)
    return done, register(client, uri, name, done.folder, step=done.step, run_id=done.mlflow_run_id)


@contextmanager
def writing(output: Path, *, own: bool = False) -> Iterator[Path]:
    """Yield an empty folder, and rename it to ``output`` at the end of the block.

    After an error in the block, ``output`` is as it was before. An older export or an empty folder is replaced.

    Args:
      output: where the export goes.
      own: replace any folder; for a run's own ``policy/``.

    Raises:
      CheckpointError: ``output`` is another kind of folder, or the folder cannot be written.
    """
    if not (own or _replaceable(output)):
        raise CheckpointError(f"{output} exists and is no export; choose another folder, or remove it")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
        try:
            new, old = work / "new", work / "old"
            new.mkdir()
            yield new
            follow_umask(new)
            if output.exists():
                os.replace(output, old)
            os.replace(new, output)
        finally:
            shutil.rmtree(work)
    except OSError as error:
        raise CheckpointError(f"cannot export to {output}: {error.strerror or error}; free some space there") from error


def describe(
    folder: Path,
    run_dir: Path,
    config: Config,
    step: int,
    mlflow_run_id: str | None,
    *,
    critic: bool | None = None,
    upload: str | None = None,
) -> None:
    """Write config.yaml, export.json and the model card to ``folder``.

    Args:
      folder: the export; the policy and the critic are in it already, unless ``critic`` is given.
      run_dir: the run directory, whose metrics up to ``step`` go into the model card.
      config: with its secrets masked.
      step: the number of updates done.
      mlflow_run_id: the run's id in MLflow, if it has one.
      critic: whether the export has a critic; by default, whether ``folder`` holds one.
      upload: an id that no other export at the same URL has, see ``download.py``.
    """
    (folder / CONFIG_FILE).write_text(to_yaml(config))
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] <= step]
    has_critic = (folder / CRITIC).is_dir() if critic is None else critic
    (folder / CARD_FILE).write_text(
        model_card(config, step, rows, critic=has_critic, changed=settings_changes(run_dir, step))
    )
    record = {"step": step, "mlflow_run_id": mlflow_run_id} | ({"upload": upload} if upload else {})
    (folder / EXPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")


def _replaceable(output: Path) -> bool:
    return not output.exists() or is_export(output) or (output.is_dir() and not any(output.iterdir()))


def _export_policy(checkpoint: Path, run_dir: Path, config: Config, folder: Path) -> None:
    base, trust, lora = base_folder(run_dir), config.model.trust_remote_code, config.policy.lora
    if lora:  # the checkpoint has the adapter alone
        model: Any = add_adapter(load_causal_lm(origin(base), trust_remote_code=trust), lora, seed=0)
    else:
        model = empty_policy(base, trust_remote_code=trust)
    unshard(checkpoint / "policy", model, "backbone.")
    write_policy(model, folder, lora=lora, base=origin(base) if lora else "")
    # The tokenizer and the generation config are those of the base model. The model's own config is not copied:
    # save_pretrained has written what the model is now (float32).
    shutil.copytree(base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json", ORIGIN))
    record(model, load_tokenizer(str(folder), trust_remote_code=config.model.trust_remote_code), folder)


def _export_critic(checkpoint: Path, run_dir: Path, config: Config, folder: Path) -> None:
    spec = critic_spec(config.algorithm, critic_objective(config.algorithm, config.critic))
    base, trust, lora = base_folder(run_dir), config.model.trust_remote_code, config.critic.lora
    if lora:
        backbone: Any = add_adapter(load_backbone(origin(base), trust_remote_code=trust), lora, seed=0)
    else:
        backbone = empty_backbone(base, trust_remote_code=trust)
    critic = DistributionalCritic(backbone, **dataclasses.asdict(spec), seed=0)
    unshard(checkpoint / "estimator", critic)
    critic.save_pretrained(folder)
