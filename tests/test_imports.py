"""Imports point one way: dvpo_service/algo <- dvpo_service <- actors <- tune_sweeps."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RAY_ALLOWED = {"launch.py", "serve.py", "warmstart.py", "replicas.py", "value_server.py"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def offenders(folder: str, *forbidden: str, allowed: frozenset[str] = frozenset()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name not in allowed
        for module in imports(path)
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


def test_the_maths_knows_nothing_of_the_rest() -> None:
    assert not offenders("dvpo_service/algo", "ray", "pydantic", "transformers", "torch.distributed", "actors")
    assert not offenders(
        "dvpo_service/algo",
        *(f"dvpo_service.{m}" for m in ("config", "data", "models", "rewards", "tracking", "types")),
    )


def test_the_service_does_not_know_its_actors() -> None:
    assert not offenders("dvpo_service", "actors", allowed=frozenset({"launch.py"}))


def test_only_a_few_files_of_the_service_know_ray() -> None:
    assert not offenders("dvpo_service", "ray", allowed=frozenset(RAY_ALLOWED))


def test_only_the_command_line_knows_the_sweeps() -> None:
    assert not offenders("dvpo_service", "tune_sweeps", allowed=frozenset({"cli.py"}))
    assert not offenders("actors", "tune_sweeps")


def test_a_config_is_read_without_the_heavy_imports() -> None:
    """What is wrong in it is said at once."""
    code = (
        "import sys, dvpo_service.cli, dvpo_service.config; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_file_is_long() -> None:
    long = [
        str(p.relative_to(ROOT))
        for folder in ("dvpo_service", "actors", "tune_sweeps", "tests")
        for p in (ROOT / folder).rglob("*.py")
        if len(p.read_text().splitlines()) > 300
    ]
    assert not long
