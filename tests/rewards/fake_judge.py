"""An OpenAI-compatible endpoint in a thread, which answers what a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Takes the request's body and key; returns a status, and the reply's text or the whole body of another endpoint.
Answer = Callable[[dict[str, Any], str], tuple[int, str | dict[str, Any]]]


class FakeJudge:
    """``asked`` has the body of every request; ``most`` is how many were under way at once."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any], key: str) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.asked.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
        status, text = self.answer(body, key)
        with self.lock:
            self.now -= 1
        if isinstance(text, dict):
            return status, text
        if status != 200:
            return status, {"error": {"message": text}}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@contextmanager
def fake_judge(answer: Answer) -> Iterator[FakeJudge]:
    """Serve on a free port of loopback for the block."""
    judge = FakeJudge(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, reply = judge.reply(body, self.headers.get("authorization", ""))
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False  # a request that a test has given up on may still sleep
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def question(body: dict[str, Any]) -> str:
    """Return the user's message."""
    return body["messages"][-1]["content"]


def slowly(seconds: float, text: str) -> Answer:
    """Answer ``text`` after a while."""

    def answer(body: dict[str, Any], key: str) -> tuple[int, str]:
        time.sleep(seconds)
        return 200, text

    return answer
