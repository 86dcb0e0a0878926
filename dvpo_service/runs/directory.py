"""The run directory, which holds a run's results: a folder, or a URL that every node reaches."""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from pathlib import Path

from upath import UPath

from dvpo_service.errors import CheckpointError, UserError, describe_error
from dvpo_service.runs.storage import StoragePath, is_url, make_folder, storage_path

# Ray sets this variable in the process that `ray job submit` starts; it holds the job's runtime_env, among others.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# This variable names the folder or URL below which relative run directories are.
BASE = "DVPO_RUNS"
# Files that the driver writes; ranks write checkpoints/ and policy/.
SMALL_FILES = ("ledger.jsonl", "config.yaml", "settings.jsonl", "metrics.jsonl", "samples.jsonl", "summary.json")
BASE_FOLDER = "base"  # the model's config and tokenizer files, to load a checkpoint's weights with (models/base.py)
OWNER = "owner.txt"


def resolve_run_dir(option: str | None, configured: str | None, name: str) -> StoragePath:
    """Return the run directory: ``--run-dir``, else ``trainer.run_dir``, else ``runs/NAME``.

    A relative directory is below ``DVPO_RUNS`` if that is set. In a Ray job it is otherwise below ``~/dvpo-runs``, as
    the job's working directory is a copy that Ray deletes.

    Args:
      option: the value of ``--run-dir``.
      configured: the value of ``trainer.run_dir``.
      name: the run's name.

    Raises:
      UserError: the file system of a URL is not installed.
    """
    given = option or configured
    base = os.environ.get(BASE)
    if base is None and JOB_CONFIG in os.environ:
        base = str(Path.home() / "dvpo-runs")
    if given and (is_url(given) or Path(os.path.expanduser(given)).is_absolute()):
        return storage_path(given)
    return storage_path(base) / (given or name) if base else storage_path(given or f"runs/{name}")


class RunDir:
    """The run directory of one run.

    Attributes:
      location: the folder or URL with the results.
      local: the same folder; for a URL a working folder on this machine, whose small files are copied to the URL at
        each checkpoint and at the end.
    """

    def __init__(self, location: str | Path | UPath):
        self.location = storage_path(location)
        self.local = Path(self.location) if isinstance(self.location, Path) else _working_folder(self.location)
        self._token = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()} ({uuid.uuid4().hex})"

    @property
    def is_remote(self) -> bool:
        """Whether the run directory is a URL."""
        return not isinstance(self.location, Path)

    def open(self) -> None:
        """Take over a URL, and copy its small files to ``local``. Does nothing for a folder.

        An object store has no lock that ends with its process. So the newest run owns the URL, and an older one that
        still runs notices at its next checkpoint and stops (``check_owner``).

        Raises:
          UserError: the URL cannot be written or read.
        """
        if not self.is_remote:
            return
        self.local.mkdir(parents=True, exist_ok=True)
        try:
            make_folder(self.location)
            (self.location / OWNER).write_text(self._token)
            for name in SMALL_FILES:
                (self.local / name).unlink(missing_ok=True)
                if (self.location / name).exists():
                    (self.local / name).write_bytes((self.location / name).read_bytes())
        except Exception as error:
            raise UserError(
                f"run directory {self.location} cannot be used: {describe_error(error, 200)}; "
                "for S3 check the bucket, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
            ) from error

    def check_owner(self) -> None:
        """Raise CheckpointError when another run has taken over the URL."""
        if self.is_remote and (owner := (self.location / OWNER).read_text()) != self._token:
            raise CheckpointError(
                f"{self.location} was taken over by {owner.partition(' (')[0]}; this run ends here so that their "
                "checkpoints do not mix. Give one of them another --run-dir"
            )

    def mirror(self) -> None:
        """Copy the small files to the URL. Does nothing for a folder."""
        if not self.is_remote:
            return
        for file in [*(self.local / name for name in SMALL_FILES), *(self.local / BASE_FOLDER).glob("*")]:
            if file.is_file():
                target = self.location / str(file.relative_to(self.local))
                make_folder(target.parent)
                target.write_bytes(file.read_bytes())


def _working_folder(url: UPath) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dvpo" / hashlib.sha256(str(url).encode()).hexdigest()[:12] / url.name
