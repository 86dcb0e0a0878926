"""Print shell lines that tell uv what pip is told on this machine: mirrors, wheels on disk, constraints, certificates.

uv reads no pip.conf. A variable of uv's that is set already stays as it is. The caller evaluates the lines.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from ast import literal_eval

# pip's option: uv's variable. What pip separates by white space, uv does too, but for find-links.
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
SECTIONS = ("global", "install", ":env:")  # a later one wins, as in pip


def options(listed: str) -> dict[str, str]:
    """Of ``pip config list``: what `pip install` goes by."""
    found: dict[str, str] = {}
    for section in SECTIONS:
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            where, _, option = key.partition(".")
            if where == section:
                found[option] = str(literal_eval(value))
    return found


def settings(found: dict[str, str]) -> dict[str, str]:
    """uv's variables."""
    told = {uv: " ".join(found[pip].split()) for pip, uv in VARIABLES.items() if found.get(pip)}
    if "UV_FIND_LINKS" in told:
        told["UV_FIND_LINKS"] = told["UV_FIND_LINKS"].replace(" ", ",")
    return told


def main() -> None:
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    for name, value in settings(options(listed)).items():
        if name not in os.environ:
            print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
