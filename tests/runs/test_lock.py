"""Two processes, one run directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dvpo_service.errors import UserError
from dvpo_service.runs.lock import locked


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(UserError, match=rf"run is in use by process {os.getpid()}; .*--run-dir"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass  # free again
