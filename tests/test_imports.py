"""Imports go one way: algo <- dvpo_service <- actors <- commands, tune_sweeps.

Within the actors: cluster <- rollouts <- weights <- training.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RAY_ALLOWED = frozenset({"deploy.py", "replicas.py", "value_server.py"})
ROOMS = ("cluster", "rollouts", "weights", "training")  # packages of the actors, lowest first


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(folder: str, *forbidden: str, allowed: frozenset[str] = frozenset(), but: str | None = None) -> list[str]:
    """Return the forbidden imports in files below ``folder``, except for files named ``allowed`` or below ``but``."""
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name not in allowed and not (but and path.is_relative_to(ROOT / but))
        for module in imports(path)
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


def test_the_maths_knows_nothing_of_the_rest() -> None:
    assert not offenders("dvpo_service/algo", "ray", "pydantic", "transformers", "torch.distributed", "actors")
    known = {"dvpo_service.algo"}
    strangers = [
        f"{path.name} imports {module}"
        for path in (ROOT / "dvpo_service/algo").rglob("*.py")
        for module in imports(path)
        if module.startswith("dvpo_service") and not any(module.startswith(k) for k in known)
    ]
    assert not strangers


def test_objectives_and_estimators_know_no_ray() -> None:
    for room in ("objectives", "estimators", "registry"):
        assert not offenders(f"dvpo_service/{room}", "ray", "torch.distributed", "actors")


def test_what_a_config_can_name_stands_below_the_config() -> None:
    rooms = ("config", "data", "models", "rewards", "tracking", "types", "estimators", "objectives")
    assert not offenders("dvpo_service/registry", "torch", *(f"dvpo_service.{room}" for room in rooms))


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_of_the_actors_import_downwards(room: str) -> None:
    above = ROOMS[ROOMS.index(room) + 1 :]
    assert not offenders(f"actors/{room}", *(f"actors.{other}" for other in above), "dvpo_service.commands")


def test_only_the_commands_know_the_actors() -> None:
    assert not offenders("dvpo_service", "actors", allowed=frozenset({"cli.py"}), but="dvpo_service/commands")


def test_only_a_few_files_of_the_service_know_ray() -> None:
    assert not offenders("dvpo_service", "ray", allowed=RAY_ALLOWED, but="dvpo_service/commands")


def test_the_service_does_not_know_its_commands() -> None:
    assert not offenders(
        "dvpo_service", "dvpo_service.commands", allowed=frozenset({"cli.py"}), but="dvpo_service/commands"
    )


def test_only_the_command_line_knows_the_sweeps() -> None:
    assert not offenders("dvpo_service", "tune_sweeps", allowed=frozenset({"cli.py"}))
    assert not offenders("actors", "tune_sweeps")


def test_no_import_runs_in_a_circle() -> None:
    """Imports inside functions and imports for types count as well."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ("dvpo_service", "actors", "tune_sweeps")
        for path in (ROOT / folder).rglob("*.py")
    }
    graph = {name: {m for m in imports(path) if m in modules and m != name} for name, path in modules.items()}
    state: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != "open", " -> ".join((*path[path.index(name) :], name))
        if name in state:
            return
        state[name] = "open"
        for other in sorted(graph[name]):
            visit(other, (*path, name))
        state[name] = "done"

    for name in sorted(graph):
        visit(name, ())


def test_a_config_is_read_without_the_heavy_imports() -> None:
    """So that a mistake in a config is reported at once."""
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


@pytest.mark.parametrize("module", ["actors.training.critic", "actors.rollouts.engine"])
def test_an_actor_starts_without_scikit_learn(module: str) -> None:
    """transformers imports it for assisted generation, and with it pandas and scipy: a fifth of a rank's start."""
    code = f"import {module}, sys; from transformers import AutoModelForCausalLM, Qwen2ForCausalLM; "
    code += "sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
