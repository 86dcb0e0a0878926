"""Register an export as a version of a model in MLflow's registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dvpo_service.config import Config
from dvpo_service.errors import TrackingError
from dvpo_service.tracking.store import reaching, sqlite_path, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def registry_uri(config: Config, run_dir: Path) -> str:
    """Return the run's tracking URI, which is also the URI of its registry.

    Raises:
      TrackingError: the run had no MLflow, or its SQLite file is not on this machine.
    """
    if not (config.tracking.mlflow or config.tracking.mlflow_uri):
        raise TrackingError(f"{run_dir}: the run had no MLflow (tracking.mlflow=false), so there is no registry")
    uri = tracking_uri(config, run_dir)
    if (file := sqlite_path(uri)) and not file.exists():
        raise TrackingError(f"{file} is not here: the run logged to MLflow on another machine, or was moved")
    return uri


def register(client: MlflowClient, uri: str, name: str, folder: Path, *, step: int, run_id: str | None) -> str:
    """Register ``folder`` as the newest version of the model ``name``, and return the version's number.

    With a SQLite store, the version's source is the folder itself. A server accepts only its own artifacts as a source,
    so the folder is first uploaded to the run ``run_id``.

    Raises:
      TrackingError: MLflow refuses, or the server has no such run to upload to.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    with reaching(uri):
        try:
            client.create_registered_model(name, description="Policies trained by the DVPO service.")
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        source = folder.absolute().as_uri() if sqlite_path(uri) else _upload(client, folder, step, run_id)
        return str(client.create_model_version(name, source, run_id=run_id, tags={"step": str(step)}).version)


def _upload(client: MlflowClient, folder: Path, step: int, run_id: str | None) -> str:
    if run_id is None:
        raise TrackingError(f"{folder}: its run is not known to MLflow, and a server keeps models of runs only")
    path = f"export/step-{step:06d}"
    client.log_artifacts(run_id, str(folder), path)
    return f"runs:/{run_id}/{path}"
