"""The watch over a pool's actors, without Ray: when it fails, callers that wait get its error."""

from __future__ import annotations

import pytest

from actors.cluster.health import Budget
from actors.cluster.pool import PoolError
from actors.cluster.supervisor import Rhythm, Supervisor


def test_a_watch_that_failed_is_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor("rollout", 1, lambda i: object(), Budget(3, 60, 1, 9), Rhythm(9, 0.01, 9))

    def fails() -> None:
        raise OSError("the connection to Ray is gone")

    monkeypatch.setattr(supervisor, "_listen", fails)
    supervisor.wait_started()
    supervisor.wait(5)
    with pytest.raises(PoolError, match="the connection to Ray is gone"):
        supervisor.serving()
    supervisor.close()
