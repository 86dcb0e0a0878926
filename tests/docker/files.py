"""The files in docker/, read as their users read them: by Compose, and by a YAML parser for the manifests."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE, COMPOSE_GPU = DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"
KUBERAY = DOCKER / "kuberay"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tool(name: str) -> str:
    """Return the path of a program that a package of the ``dev`` extra installs."""
    return str(Path(sys.executable).parent / name)


@functools.cache
def compose(*files: Path) -> dict[str, Any]:
    """Return ``docker compose config`` of all profiles, with anchors and variables resolved.

    Compose checks the files against its own schema, and needs no Docker engine for it.

    Raises:
      CalledProcessError: a file is wrong; ``stderr`` has Compose's message.
    """
    command = [tool("docker-compose"), "--env-file", str(DOCKER / ".env.example"), "--profile", "*"]
    for file in files or (COMPOSE,):
        command += ["--file", str(file)]
    environment = {"PATH": os.environ["PATH"], "POSTGRES_PASSWORD": "secret"}
    done = subprocess.run(
        [*command, "config", "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def services(*files: Path) -> dict[str, dict[str, Any]]:
    return compose(*files)["services"]


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / name).read_text())


def pod_templates() -> dict[str, dict[str, Any]]:
    """Return the pod templates of the RayCluster by the name of their group."""
    spec = manifest("raycluster.yaml")["spec"]
    return {"head": spec["headGroupSpec"]["template"]} | {
        group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]
    }


def guide_commands(program: str) -> list[str]:
    """Return the lines in docs/docker.md's shell blocks that start with ``program``, with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/docker.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.startswith(program)]


def programs() -> list[list[str]]:
    """Return every command line of a container or a Ray job, one program each: ``ray job submit -- X`` gives two."""
    lines = [[*(s.get("entrypoint") or []), *s["command"]] for s in services().values() if s.get("command")]
    lines.append(shlex.split(manifest("rayjob.yaml")["spec"]["entrypoint"]))
    for line in guide_commands("docker compose"):
        words = shlex.split(line)
        if "train" in words and "dvpo" in words:
            lines.append(words[words.index("dvpo") :])
    commands = []
    for words in lines:
        if words[:3] == ["tini", "-g", "--"]:
            words = words[3:]
        if words[:3] == ["ray", "job", "submit"] and "--" in words:
            commands.append(words[words.index("--") + 1 :])
        commands.append(words)
    return commands
