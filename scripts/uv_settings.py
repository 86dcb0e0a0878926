"""Print shell lines that give uv the settings of pip on this machine: mirrors, local wheels, constraints, certificates.

uv does not read pip.conf. A variable of uv that is already set keeps its value. The caller evaluates the lines.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from ast import literal_eval

# pip's option to uv's variable. Both separate values by white space, except that uv's find-links takes commas.
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
SECTIONS = ("global", "install", ":env:")  # a later section wins, as in pip


def options(listed: str) -> dict[str, str]:
    """Return the options that `pip install` uses, from the output of ``pip config list``."""
    by_option: dict[str, str] = {}
    for section in SECTIONS:
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            where, _, option = key.partition(".")
            if where == section:
                by_option[option] = str(literal_eval(value))
    return by_option


def settings(by_option: dict[str, str]) -> dict[str, str]:
    """Return uv's variables for pip's options."""
    variables = {uv: " ".join(by_option[pip].split()) for pip, uv in VARIABLES.items() if by_option.get(pip)}
    if "UV_FIND_LINKS" in variables:
        variables["UV_FIND_LINKS"] = variables["UV_FIND_LINKS"].replace(" ", ",")
    return variables


def main() -> None:
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    for name, value in settings(options(listed)).items():
        if name not in os.environ:
            print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
