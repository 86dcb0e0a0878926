"""Write one MLflow run: its parameters once, then metrics, figures and samples during the run."""

from __future__ import annotations

import json
import math
import posixpath
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dvpo_service.errors import TrackingError
from dvpo_service.host.secrets import flatten, mask, mask_message
from dvpo_service.tracking.names import PARAM_LIMIT, TAG_LIMIT, safe_experiment, safe_name, safe_run_name, safe_text
from dvpo_service.tracking.outbox import Outbox
from dvpo_service.tracking.samples import SamplesFile
from dvpo_service.tracking.spool import Spool
from dvpo_service.tracking.store import artifact_root, open_store, reaching

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Run

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
# The step of the newest metrics in the store. A run that resumes reads it with a single request.
STEP_METRIC = "trainer/step"
SAMPLES = "samples.json"
_BATCH, _METRIC_BATCH = 100, 1000


class MlflowSink:
    """Writes one MLflow run.

    The constructor starts the run, or continues ``run_id``. After the constructor, no failure of MLflow reaches the
    caller: everything is sent by three ``Outbox`` threads. ``outbox`` sends metrics. ``files`` sends artifacts, which
    wait in the folder ``unsent``; it is a thread of its own because a store that rejects artifacts may still accept
    metrics. ``drawing`` draws the pictures.

    Args:
      uri: the tracking URI.
      experiment, run_name, tags, description: of the MLflow run.
      config: logged as the run's parameters.
      config_yaml: logged as ``config.yaml``.
      unsent: the folder for artifacts that MLflow does not have yet.
      samples: the file whose rows become the sample table.
      run_id: the MLflow run to continue, if any.
      resume_step: the step at which the run resumes.
      warn: called with every warning, on any thread.

    Attributes:
      last_step: the newest step whose metrics the store has, -1 for none. Steps up to it are not sent again, since
        MLflow cannot delete points.

    Raises:
      TrackingError: the store cannot be used.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        config: Mapping[str, Any],
        config_yaml: str,
        *,
        unsent: Path,
        samples: SamplesFile,
        run_id: str | None = None,
        resume_step: int = 0,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        warn: Callable[[str], None],
    ) -> None:
        self.uri = uri
        self._client: MlflowClient = open_store(uri)
        with reaching(uri):
            old = _find_run(self._client, run_id, warn) if run_id else None
            self.run_id = old.info.run_id if old else self._create(experiment, run_name)
            self.last_step = int(old.data.metrics.get(STEP_METRIC, -1)) if old else -1
            self._log_config(dict(config), config_yaml, old, resume_step)
            notes = dict(mask(dict(tags or {}))) | {"mlflow.note.content": description}
            for key, value in notes.items():
                self._client.set_tag(self.run_id, safe_name(key), safe_text(value, TAG_LIMIT))
            if old:
                self._client.update_run(self.run_id, status="RUNNING")
        self.outbox, self.files, self.drawing = (
            Outbox(lambda text: warn(mask_message(text, uri)), _hopeless, name) for name in ("metrics", "files", "draw")
        )
        self._last_at = 0  # ms since the epoch, of the newest step's metrics
        self._samples = samples
        self._spool = Spool(unsent, fresh=run_id is None and resume_step == 0)
        for path in self._spool.waiting():
            self._put_file(path)
        if samples.last >= 0:
            self.send_samples()

    def log_metrics(self, step: int, metrics: Mapping[str, float], now: float | None = None) -> None:
        """Queue all metrics of a step. After an outage of MLflow, the steps are sent in order.

        Args:
          step: the number of updates done.
          metrics: by name.
          now: when they were measured, in seconds since the epoch; by default now.
        """
        from mlflow.entities import Metric

        at = self._last_at = int((time.time() if now is None else now) * 1000)
        if step <= self.last_step:
            return
        self.last_step = step
        # MLflow stores infinity as 1.8e308, which flattens its charts; NaN leaves a gap.
        rows = [
            Metric(safe_name(name), float(value) if math.isfinite(value) else math.nan, at, step)
            for name, value in {**metrics, **self._outages(), STEP_METRIC: step}.items()
        ]

        def send() -> None:
            for i in range(0, len(rows), _METRIC_BATCH):
                self._client.log_batch(self.run_id, metrics=rows[i : i + _METRIC_BATCH])

        self.outbox.put(f"metrics of step {step}", send, keep=True)

    def _outages(self) -> dict[str, float]:
        failures = self.outbox.failures + self.files.failures
        return {"tracking/mlflow_failures": failures} if failures else {}

    def log_figure(self, step: int, name: str, draw: Callable[[], Figure]) -> None:
        """Queue the figure ``figures/<name>/step-000100.png``. ``draw`` is called on another thread."""
        path = f"figures/{name}/step-{step:06d}.png"
        self.drawing.put(f"figure {path}", lambda: self._add(path, lambda file: draw().savefig(file)))

    def send_samples(self) -> None:
        """Queue the whole sample table. Its rows are read when it is sent, so sending it twice does no harm."""
        self.files.put(SAMPLES, self._send_samples, keep=True)

    def finish(
        self,
        status: RunStatus,
        summary: Mapping[str, Any] | None,
        deadline_s: float,
    ) -> int:
        """Send what waits, close the MLflow run, and return the number of calls that were not made in time.

        Args:
          status: of the MLflow run.
          summary: logged as ``summary.json``, and its held-out accuracies as metrics.
          deadline_s: how long to wait, in seconds.
        """
        end = time.monotonic() + deadline_s
        if summary is not None:
            final = mask(dict(summary))
            self.drawing.put("summary.json", lambda: self._add("summary.json", lambda file: _write_json(file, final)))
            self.outbox.put("summary", lambda: self._log_summary(final), keep=True)
        self.outbox.put("run status", lambda: self._client.set_terminated(self.run_id, status=status), keep=True)
        boxes = (self.drawing, self.outbox, self.files)
        unsent = sum(box.close(max(0.0, end - time.monotonic())) for box in boxes)
        self._spool.close(all_sent=unsent == 0)
        return unsent

    def _add(self, path: str, write: Callable[[Path], None]) -> None:
        self._spool.add(path, write)
        self._put_file(path)

    def _put_file(self, path: str) -> None:
        def upload(file: Path) -> None:
            self._client.log_artifact(self.run_id, str(file), posixpath.dirname(path) or None)

        self.files.put(path, lambda: self._spool.send(path, upload), keep=True)

    def _send_samples(self) -> None:
        table = self._samples.table()
        if table["data"]:
            # MLflow's UI shows a table only when the run has this tag.
            self._client.set_tag(
                self.run_id, "mlflow.loggedArtifacts", json.dumps([{"path": SAMPLES, "type": "table"}])
            )
        self._client.log_text(self.run_id, json.dumps(table), SAMPLES)

    def _log_summary(self, summary: dict[str, Any]) -> None:
        """Log the held-out accuracies as metrics.

        Their time is that of the newest step, so that sending them again gives the same points.
        """
        from mlflow.entities import Metric

        # held_out_greedy_after: {"val": 0.6}  ->  metric held_out/greedy_after/val
        rows = [
            Metric(
                safe_name(f"held_out/{key.removeprefix('held_out_')}/{split}"),
                float(value),
                self._last_at,
                max(self.last_step, 0),
            )
            for key, by_split in summary.items()
            if key.startswith("held_out_") and isinstance(by_split, dict)
            for split, value in by_split.items()
            if value is not None
        ]
        self._client.log_batch(self.run_id, metrics=rows)

    def _create(self, experiment: str, run_name: str) -> str:
        experiment = experiment_id(self._client, experiment, self.uri)
        return self._client.create_run(experiment, run_name=safe_run_name(run_name)).info.run_id

    def _log_config(self, config: dict[str, Any], text: str, old: Run | None, resume_step: int) -> None:
        """Log the config. MLflow's parameters cannot change, so what a resumed run changed goes into a tag."""
        from mlflow.entities import Param

        params = {safe_name(key): safe_text(value, PARAM_LIMIT) for key, value in flatten(mask(config)).items()}
        known = old.data.params if old else {}
        changed = [f"{k}: {known[k]} -> {v}" for k, v in params.items() if known.get(k, v) != v]
        fresh = [Param(k, v) for k, v in params.items() if k not in known]
        for i in range(0, len(fresh), _BATCH):
            self._client.log_batch(self.run_id, params=fresh[i : i + _BATCH])
        if changed:
            what = safe_text("; ".join(changed), TAG_LIMIT)
            self._client.set_tag(self.run_id, f"changed_at_step_{resume_step}", what)
        name = f"config-step-{resume_step:06d}.yaml" if changed else "config.yaml"
        self._client.log_text(self.run_id, text, name)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Return the id of the experiment ``name``, and create it if needed.

    Raises:
      TrackingError: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    name = safe_experiment(name)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_root(uri))
        except MlflowException as error:  # another trial of a sweep has created it meanwhile
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow experiment {name!r} was deleted: restore it (mlflow experiments restore) "
            "or give another one: tracking.experiment=NAME"
        )
    return experiment.experiment_id


def _find_run(client: MlflowClient, run_id: str, warn: Callable[[str], None]) -> Run | None:
    """Return the run to continue; warn and return None when this store does not have it any more."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage == "deleted":
        warn(f"MLflow run {run_id} is not in this store any more: a new run gets all metrics so far")
        return None
    return run


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2), encoding="utf-8")


def _hopeless(error: Exception) -> bool:
    """Return whether MLflow refuses the call itself, so that trying again cannot succeed."""
    return getattr(error, "error_code", None) in {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
