"""Run a Python program that is not trusted, in a process of its own with limits, and say how it ended.

Where the kernel allows it, the program is alone: in namespaces of its own it sees no network, no other process, and no
file but the interpreter's (docs/rewards.md says what that does not protect from).
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import psutil

from dvpo_service.config.code import CodeConfig
from dvpo_service.errors import one_line
from dvpo_service.rewards import sandbox_inside

log = logging.getLogger(__name__)

_POLL_S = 0.05
_END_S = 10.0  # for the kernel to end what was killed
_ISOLATE = ("--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=KILL")
_MARK = "DVPO_SANDBOX"
_OUT_OF_TIME = (128 + signal.SIGXCPU, 128 + signal.SIGKILL)  # the kernel's end of a program at RLIMIT_CPU


class SandboxFailed(RuntimeError):
    """The sandbox itself could not be set up: this says nothing about the program."""


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Attributes:
      code: its exit code; 128 + the signal's number where a signal ended it.
      out, err: what it wrote, cut to the limit.
      stopped: why it was ended, else None.
    """

    code: int
    out: str
    err: str
    stopped: str | None = None


def run_program(files: Mapping[str, str], main: str, stdin: str, limits: CodeConfig) -> Ran:
    """Run ``main``, one of ``files`` (names and texts), with ``stdin``.

    Raises:
      SandboxFailed: it could not be started.
    """
    return _run(files, main, stdin, limits, isolated=isolation() is None)


@cache
def isolation() -> str | None:
    """Return None where programs run isolated, or why they cannot; then one line is logged."""
    if shutil.which("unshare") is None:
        why: str | None = "there is no unshare command"
    else:
        try:
            probe = _run({"probe.py": "print(1)"}, "probe.py", "", CodeConfig(), isolated=True)
            why = None if probe.out == "1\n" else f"{probe.stopped or ''} {probe.err}"
        except SandboxFailed as error:
            why = str(error)
    if why is not None:
        log.warning(
            "code reward: no namespaces here (%s), so programs are limited in time, memory and output, but can reach "
            "the network and this user's files: run only code that you trust, or see docs/rewards.md",
            one_line(why, 200),
        )
    return why


def _run(files: Mapping[str, str], main: str, stdin: str, limits: CodeConfig, *, isolated: bool) -> Ran:
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="dvpo-code-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "root").mkdir()
        home = sandbox_inside.HOME if isolated else str(folder / "work")
        if not isolated:
            Path(home).mkdir()
            for file, text in files.items():
                Path(home, file).write_text(text, encoding="utf-8", errors="surrogatepass")
        (folder / "stdin").write_text(stdin, encoding="utf-8", errors="surrogatepass")
        ready, says_ready = os.pipe()
        stack.callback(os.close, ready)
        try:
            settings = _settings(files, f"{home}/{main}", limits, folder / "root", _environment(home, mark), isolated)
            (folder / "settings").write_text(json.dumps(settings | {"ready": says_ready}))
            process = _start(folder, home, mark, says_ready, isolated)
        finally:
            os.close(says_ready)
        try:
            out, err, stopped = _watch(process, limits)
        finally:
            _end(process, mark)
        if not _read_now(ready):
            raise SandboxFailed(one_line(err or f"exit code {process.returncode}"))
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if stopped is None and code in _OUT_OF_TIME:
            stopped = f"no end within {limits.cpu_s} s of processor time"
        return Ran(code, out, err, stopped)


def _settings(
    files: Mapping[str, str], program: str, limits: CodeConfig, root: Path, environment: dict[str, str], isolated: bool
) -> dict[str, Any]:
    """Return what ``sandbox_inside`` reads."""
    folders, links = _folders()
    return {
        **limits.model_dump(include={"cpu_s", "memory_mib", "files_mib", "processes"}),
        "isolated": isolated,
        "root": str(root),
        "folders": folders,
        "links": links,
        "files": dict(files),
        "command": [sys.executable, "-I", "-B", program],
        "environment": environment,
    }


def _start(folder: Path, home: str, mark: str, says_ready: int, isolated: bool) -> subprocess.Popen[bytes]:
    inside = [sys.executable, "-I", "-S", sandbox_inside.__file__, str(folder / "settings")]
    with (folder / "stdin").open("rb") as given:
        return subprocess.Popen(
            ["unshare", *_ISOLATE, "--", *inside] if isolated else inside,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(home, mark),
            cwd="/" if isolated else home,
            pass_fds=(says_ready,),
            start_new_session=True,
        )


def _read_now(pipe: int) -> bytes:
    """Return the byte in the pipe, if there is one."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        return os.read(pipe, 1)
    return b""


def _environment(home: str, mark: str) -> dict[str, str]:
    """Return the program's environment: nothing of ours, as it may hold secrets."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return one | {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home, _MARK: mark}


@cache
def _folders() -> tuple[list[str], dict[str, str]]:
    """Return the folders that an interpreter needs, and the links in the root folder (``/lib`` to ``usr/lib``)."""
    paths = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), os.path.realpath(sys.executable)]
    wanted = {str(Path(p)) for p in paths if Path(p).is_dir()} | {"/usr"}
    links = {}
    for name in ("/lib", "/lib64", "/lib32", "/bin", "/sbin"):
        if os.path.islink(name):
            links[name] = os.readlink(name)
        elif os.path.isdir(name):
            wanted.add(name)
    real = {os.path.realpath(folder) for folder in wanted}
    top = [f for f in sorted(wanted | real) if not any(f.startswith(o.rstrip("/") + "/") for o in wanted | real)]
    return top, links


def _watch(process: subprocess.Popen[bytes], limits: CodeConfig) -> tuple[str, str, str | None]:
    """Read what the program writes until it ends or breaks a limit; return that, and the limit."""
    until, look_at = time.monotonic() + limits.wall_s, 0.0
    most = limits.output_kib << 10
    pipes: dict[IO[bytes], bytearray] = {p: bytearray() for p in (process.stdout, process.stderr) if p}
    stopped: str | None = None
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and stopped is None:
            events = selector.select(_POLL_S)
            for key, _ in events:
                source: Any = key.fileobj
                chunk = os.read(source.fileno(), 1 << 16)
                pipes[source] += chunk
                if not chunk:
                    selector.unregister(source)
            if any(len(text) > most for text in pipes.values()):
                stopped = f"more than {limits.output_kib} KiB of output"
            elif time.monotonic() > until:
                stopped = f"no end within {limits.wall_s:g} s"
            elif time.monotonic() > look_at:
                stopped = _beyond(process, limits)
                look_at = time.monotonic() + _POLL_S
    if stopped is None:  # it has closed its output, and may go on
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        stopped = None if process.poll() is not None else f"no end within {limits.wall_s:g} s"
    out, err = (bytes(text[:most]).decode("utf-8", "replace") for text in pipes.values())
    return out, err, stopped


def _beyond(process: subprocess.Popen[bytes], limits: CodeConfig) -> str | None:
    """Return the limit that all of the program's processes together have broken; the kernel counts each alone."""
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
        if len(family) > limits.processes + 2:  # two of ours
            return f"more than {limits.processes} processes"
        used = 0
        for member in family:
            with suppress(psutil.Error):
                used += member.memory_info().rss - member.memory_info().shared
        if used > limits.memory_mib << 20:
            return f"more than {limits.memory_mib} MiB of memory"
    return None


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill the program with all that it started, and wait for that. Raises SandboxFailed if something does not end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired as error:
        raise SandboxFailed(f"a killed program does not end within {_END_S:g} s") from error
    if _is_isolated(process):
        return
    until = time.monotonic() + _END_S
    while left := _marked(mark):
        for member in left:  # they left the group, as daemons do
            with suppress(psutil.Error):
                member.kill()
        if time.monotonic() > until:
            raise SandboxFailed(f"{len(left)} processes of a program do not end within {_END_S:g} s")
        time.sleep(_POLL_S)


def _is_isolated(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the process was started in namespaces, whose end is the end of all in them."""
    return isinstance(process.args, list) and process.args[0] == "unshare"


def _marked(mark: str) -> list[psutil.Process]:
    """Return the processes that have the program's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
