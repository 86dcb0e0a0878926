"""``make setup`` installs with uv, which reads no pip.conf: scripts/uv_settings.py passes pip's settings to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "uv_settings.py"


@pytest.fixture
def environment_after(tmp_path):
    """Return a shell's environment after the script ran, given pip's configuration file and some variables."""

    def run(configuration: str = "", **variables: str) -> dict[str, str]:
        file = tmp_path / "pip.conf"
        file.write_text(configuration)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_")) and k != "SSL_CERT_FILE"}
        homes = {name: str(tmp_path / "none") for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS")}
        command = f'set -eu; lines=$("{sys.executable}" "{SCRIPT}"); eval "$lines"; env -0'
        done = subprocess.run(
            ["bash", "-c", command],
            env=inherited | homes | {"PIP_CONFIG_FILE": str(file)} | variables,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)

    return run


def test_a_mirror_wheels_on_disk_and_constraints_reach_uv(environment_after) -> None:
    environment = environment_after(
        "[global]\nindex-url = https://mirror.test/simple\nextra-index-url = file:///a/simple\n  file:///b/simple\n"
        "find-links = /wheels\n  https://wheels.test/all\ncert = /ca.crt\n[install]\nconstraint = /limits.txt\n"
        "trusted-host = mirror.test\n"
    )
    assert environment["UV_DEFAULT_INDEX"] == "https://mirror.test/simple"
    assert environment["UV_INDEX"] == "file:///a/simple file:///b/simple"
    assert environment["UV_FIND_LINKS"] == "/wheels,https://wheels.test/all"
    assert environment["UV_CONSTRAINT"] == "/limits.txt"
    assert environment["UV_INSECURE_HOST"] == "mirror.test"
    assert environment["SSL_CERT_FILE"] == "/ca.crt"


def test_a_variable_of_pips_wins_over_its_file_and_one_of_uvs_over_both(environment_after) -> None:
    configuration = "[global]\nindex-url = https://file.test/simple\n"
    environment = environment_after(configuration, PIP_INDEX_URL="https://variable.test/simple")
    assert environment["UV_DEFAULT_INDEX"] == "https://variable.test/simple"
    kept = environment_after(configuration, UV_DEFAULT_INDEX="https://uv.test/simple")
    assert kept["UV_DEFAULT_INDEX"] == "https://uv.test/simple"


def test_what_a_shell_would_run_is_quoted(environment_after, tmp_path) -> None:
    url = f"https://user:$(touch {tmp_path}/ran)@mirror.test/simple"
    assert environment_after(PIP_INDEX_URL=url)["UV_DEFAULT_INDEX"].startswith("https://user:$(touch")
    assert not (tmp_path / "ran").exists()


def test_without_a_configuration_uv_is_told_nothing(environment_after) -> None:
    assert not [name for name in environment_after() if name.startswith("UV_")]
