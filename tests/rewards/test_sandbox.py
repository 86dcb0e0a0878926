"""Hostile programs: each ends within its limits, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from dvpo_service.config.code import CodeConfig
from dvpo_service.rewards import sandbox
from dvpo_service.rewards.sandbox import Ran, SandboxFailed, isolation, run_program
from tests.builders import needs

LIMITS = CodeConfig(cpu_s=1, wall_s=12, memory_mib=256, processes=8, files_mib=4, output_kib=64)
alone = needs(isolation())

FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
MEMORY_OF_MANY = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        held = bytearray(100 * 2**20)
        time.sleep(60)
time.sleep(60)
"""
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        time.sleep(100)
    os._exit(0)
time.sleep(0.1)
print("done")
"""
IGNORES_THE_END = """
import signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
while True:
    pass
"""


def run(program: str, stdin: str = "", limits: CodeConfig = LIMITS) -> Ran:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    started = time.perf_counter()
    ran = run_program({"main.py": program}, "main.py", stdin, limits)
    assert time.perf_counter() - started < limits.wall_s + 20
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before, "nothing is left"
    return ran


def marked_since(before: set[int]) -> list[psutil.Process]:
    """Return the processes of programs that were not there before."""
    new = [p for p in psutil.process_iter(["environ"]) if p.pid not in before]
    return [p for p in new if "DVPO_SANDBOX" in (p.info["environ"] or {})]


def unisolated(program: str, limits: CodeConfig = LIMITS) -> Ran:
    return sandbox._run({"main.py": program}, "main.py", "", limits, isolated=False)


def test_a_program_reads_writes_and_ends() -> None:
    assert run("print(input() + '!')", "hello") == Ran(0, "hello!\n", "")
    assert run("import sys; sys.exit(3)").code == 3
    assert "ZeroDivisionError" in run("1 / 0").err
    assert run("open('a', 'w').write('x'); print(open('a').read())").out == "x\n", "it has a folder to work in"
    assert run("print('\\u00fc\\ud800'.encode('utf-8', 'surrogatepass'))").code == 0


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("while True: pass", "no end within 1 s of processor time"),
        (IGNORES_THE_END, "no end within 1 s of processor time"),
        ("while True: print('x' * 1000)", "more than 64 KiB of output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "more than 64 KiB of output"),
        (MEMORY_OF_MANY, "more than 256 MiB of memory"),
    ],
)
def test_what_does_not_end_is_ended(program: str, why: str) -> None:
    assert run(program).stopped == why


@pytest.mark.parametrize("first", ["", "import os\nos.close(1)\nos.close(2)\n"])
def test_what_waits_is_ended(first: str) -> None:
    limits = LIMITS.model_copy(update={"wall_s": 0.8})
    assert run(f"{first}import time; time.sleep(100)", limits=limits).stopped == "no end within 0.8 s"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("x = bytearray(2**30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(8 * 2**20))", "OSError"),
        ("import os\nx = [os.open('/dev/null', 0) for _ in range(100)]", "Too many open files"),
    ],
)
def test_what_takes_too_much_is_refused(program: str, error: str) -> None:
    ran = run(program)
    assert ran.code != 0
    assert error in ran.err or ran.code == 128 + 25, "or SIGXFSZ"


@alone
def test_a_fork_bomb_ends() -> None:
    assert run(FORK_BOMB).stopped in ("more than 8 processes", "no end within 12 s")
    assert run("print(1)").out == "1\n", "the machine works on"


@alone
def test_a_daemon_does_not_outlive_its_program() -> None:
    before = set(psutil.pids())
    assert run(DAEMON).out == "done\n"
    assert not marked_since(before)


# Each must raise within the sandbox.
FORBIDDEN = [
    "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
    "import socket; socket.getaddrinfo('example.org', 80)",
    "import os, signal; os.kill({pid}, signal.SIGTERM)",
    "open('/proc/{pid}/environ').read()",
    "open('/etc/passwd')",
    "open('{file}')",
    "open('/usr/new', 'w')",
    "import sys; open(sys.executable, 'r+')",
    "open('/proc/sys/kernel/core_pattern', 'r+')",
    "import os; os.mknod('disk', 0o60600, os.makedev(254, 0))",
    "import os; os.chroot('.')",
    "import os; os.setuid(1)",
    "import ctypes; assert ctypes.CDLL(None).mount(b'tmpfs', b'/usr', b'tmpfs', 0, None) == 0",
    "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "import os; os.environ['HUNTER']",
]


@alone
def test_the_world_is_shut_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNTER", "secret")
    (tmp_path / "file").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        tries = [code.format(port=port, pid=os.getpid(), file=tmp_path / "file") for code in FORBIDDEN]
        program = (
            f"for code in {tries!r}:\n    try:\n        exec(code)\n    except Exception:\n        continue\n"
            "    print(code)\nprint('tried all')"
        )
        assert run(program).out == "tried all\n", "what could be done is printed"


@alone
def test_signals_reach_nobody_else() -> None:
    ran = run("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)")
    assert ran.code in (0, 1)
    assert psutil.pid_exists(os.getpid())


def test_without_namespaces_there_are_limits_still() -> None:
    assert unisolated("print(1)") == Ran(0, "1\n", "")
    assert "MemoryError" in unisolated("x = bytearray(2**30)").err
    assert unisolated("while True: print('x' * 1000)").stopped == "more than 64 KiB of output"
    assert "KeyError" in unisolated("import os; os.environ['HOME_OF_SECRETS']").err
    before = set(psutil.pids())
    assert unisolated(DAEMON).out == "done\n"
    assert not marked_since(before), "its daemon is found by its mark"


def test_that_there_are_no_namespaces_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    isolation.cache_clear()
    try:
        assert [isolation(), isolation()] == ["there is no unshare command"] * 2
        [record] = caplog.records
        assert "programs are limited in time, memory and output, but can reach the network" in record.getMessage()
        assert "\n" not in record.getMessage()
    finally:
        isolation.cache_clear()


def test_a_sandbox_that_does_not_start_is_no_fault_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sandbox_inside, "__file__", "/no/such/file.py")
    with pytest.raises(SandboxFailed, match="No such file"):
        run("print(1)")
