"""How ``dvpo serve`` ends: Serve and Ray are ended, and what Ray prints about that is not shown."""

from __future__ import annotations

import os
import signal

import pytest

from dvpo_service.commands import serve
from dvpo_service.host.stopping import Stopped


def _serve_until(signum: signal.Signals) -> None:
    with serve.stopped_after():
        os.kill(os.getpid(), signum)
        signal.pause()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_serve_and_ray_without_their_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    ended = []

    def end(what: str) -> None:
        print("(raylet) There are infinite retries remaining")  # as Ray does when the controller ends
        ended.append(what)

    monkeypatch.setattr(serve.serve, "shutdown", lambda: end("serve"))
    monkeypatch.setattr(serve.ray, "shutdown", lambda: end("ray"))
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(Stopped) as stopped:
            _serve_until(signum)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopped.value.exit_code == 128 + signum
    assert ended == ["serve", "ray"]
    assert capsys.readouterr().out == ""
