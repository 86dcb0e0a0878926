"""The MLflow run of a sweep: the parent of its trials' runs."""

from __future__ import annotations

import logging

from dvpo_service.config import Config
from dvpo_service.errors import TrackingError
from dvpo_service.tracking.mlflow_sink import experiment_id
from dvpo_service.tracking.names import TAG_LIMIT, safe_run_name, safe_text
from dvpo_service.tracking.store import open_store, reaching, tracking_uri
from tune_sweeps.records import Sweep

logger = logging.getLogger(__name__)


def open_parent(config: Config, sweep: Sweep) -> tuple[str, str]:
    """Create the sweep's MLflow run. Return the tracking URI and the run's id.

    Raises:
      TrackingError: the store cannot be reached.
    """
    uri = tracking_uri(config, sweep.folder)
    client = open_store(uri)
    with reaching(uri):
        experiment = experiment_id(client, config.tracking.experiment, uri)
        run = client.create_run(experiment, run_name=safe_run_name(sweep.folder.name))
        tags = {"mlflow.note.content": _description(sweep), "sweep": sweep.grid.name, "config": sweep.config}
        for key, value in tags.items():
            client.set_tag(run.info.run_id, key, safe_text(value, TAG_LIMIT))
    return uri, run.info.run_id


def close_parent(sweep: Sweep) -> None:
    """Mark the sweep's MLflow run as finished. If the store cannot be reached, log a warning."""
    if not (sweep.mlflow_uri and sweep.mlflow_run_id):
        return
    try:
        with reaching(sweep.mlflow_uri):
            open_store(sweep.mlflow_uri).set_terminated(sweep.mlflow_run_id, status="FINISHED")
    except TrackingError as error:
        logger.warning("the sweep's MLflow run stays open: %s", error)


def _description(sweep: Sweep) -> str:
    arms = ", ".join(f"`{a.name}`" for a in sweep.grid.arms) or "drawn from " + ", ".join(sweep.grid.space)
    return "\n".join(
        [
            f"**{sweep.grid.title}** on `{sweep.config}`.",
            "",
            f"- arms: {arms}",
            f"- compared with: `{sweep.grid.reference}`" if sweep.grid.reference else "- no reference arm",
            f"- seeds: {', '.join(map(str, sweep.seeds))}; the arms of a seed share data order and base model",
            f"- overrides: {' '.join(sweep.masked().overrides) or 'none'}",
            f"- folder: `{sweep.folder}`",
            "",
            "The trials are nested below this run: select them and open the chart view; `critic/loss/*` has every "
            "term, also the removed ones. The artifact `report.html` has the comparison with intervals.",
        ]
    )
