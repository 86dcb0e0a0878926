"""Runs as the first process of a sandbox: shuts the world out, then runs the program and waits for it.

``python sandbox_inside.py SETTINGS`` with JSON from ``sandbox.py``. It imports the standard library only: it starts
once for every test. With ``isolated`` it is process 1 of new user, mount, process and network namespaces. When it ends,
the kernel kills whatever the program has left behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY = 442, -100, 0x8000, 1  # <linux/mount.h>
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 38, 24
LAST_CAPABILITY = 63
DEVICES = ("null", "zero", "random", "urandom")
HOME = "/sandbox-home"

libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    """Call mount(2). Raises OSError."""
    names = [None if text is None else os.fsencode(text) for text in (source, str(target), kind, options)]
    if libc.mount(names[0], names[1], names[2], ctypes.c_ulong(flags), names[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def make_read_only(target: Path) -> None:
    """Make a mount and those below it read-only, and keep the flags that are locked. Raises OSError."""
    attributes = (ctypes.c_uint64 * 4)(ATTR_READ_ONLY, 0, 0, 0)
    path = os.fsencode(target)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)):
        raise OSError(ctypes.get_errno(), f"make {target} read-only")


def enter_own_root(settings: dict[str, Any]) -> None:
    """Change to a root folder in memory that has the interpreter, read-only, and an empty folder to work in."""
    root = Path(settings["root"])
    mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)
    size = f"size={settings['files_mib']}m,nr_inodes=4096,mode=755"
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, size)
    for folder in settings["folders"]:
        target = root / folder.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        mount(folder, target, flags=MS_BIND | MS_REC)
        make_read_only(target)
    for name, link in settings["links"].items():
        (root / name.lstrip("/")).symlink_to(link)
    (root / "dev").mkdir()
    for device in DEVICES:
        (root / "dev" / device).touch()
        mount(f"/dev/{device}", root / "dev" / device, flags=MS_BIND)
    (root / "proc").mkdir()
    try:
        # Read-only, as root's own processes could change the kernel's settings in /proc/sys even without capabilities.
        mount("proc", root / "proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:  # some containers do not allow it; programs rarely need it
        os.rmdir(root / "proc")
    work = root / HOME.lstrip("/")
    work.mkdir()
    for name, text in settings["files"].items():
        (work / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    os.chroot(root)
    os.chdir(HOME)


def limit(settings: dict[str, Any]) -> None:
    """Set the limits of this process and its children, and give up every capability."""
    memory, files = settings["memory_mib"] << 20, settings["files_mib"] << 20
    bounds = {
        resource.RLIMIT_CPU: settings["cpu_s"],
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: files,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if settings["isolated"]:  # elsewhere all processes of the user would count
        bounds[resource.RLIMIT_NPROC] = settings["processes"]
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        value = bound if hard < 0 else min(bound, hard)
        # A second after SIGXCPU, which a program may ignore, comes SIGKILL.
        last = value + 1 if kind == resource.RLIMIT_CPU and hard < 0 else value
        resource.setrlimit(kind, (value, last))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if settings["isolated"]:
        for capability in range(LAST_CAPABILITY):  # those beyond the kernel's last are refused
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def main() -> None:
    """Run the program in the sandbox and end with its exit code."""
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    ready = settings["ready"]
    if settings["isolated"]:
        try:
            enter_own_root(settings)
        except OSError as error:
            sys.exit(str(error))
    child = os.fork()
    if child == 0:
        try:
            limit(settings)
            os.write(ready, b"1")
            os.close(ready)
            os.execve(settings["command"][0], settings["command"], settings["environment"])
        except BaseException as error:  # noqa: BLE001 - a copy of this process must not go on
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(127)
    os.close(ready)
    for standard in (0, 1, 2):  # a pipe ends when the program and its children have closed it
        os.close(standard)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
