"""The Dockerfile: hadolint's rules, and this project's promises about its images."""

from __future__ import annotations

import io
import re
import subprocess
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from tests.docker.files import DOCKER, PYPROJECT, ROOT, tool


@pytest.fixture(scope="module")
def instructions() -> list[dict[str, Any]]:
    parser = DockerfileParser(fileobj=io.BytesIO((DOCKER / "Dockerfile").read_bytes()))
    return [line for line in parser.structure if line["instruction"] != "COMMENT"]


def values(instructions: list[dict[str, Any]], name: str) -> list[str]:
    return [line["value"] for line in instructions if line["instruction"] == name]


def final_stage(instructions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    start = max(i for i, line in enumerate(instructions) if line["instruction"] == "FROM")
    return instructions[start:]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [tool("hadolint"), "--no-color", str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_base_is_pinned_to_a_patch_version_of_a_supported_python(instructions) -> None:
    stages = set()
    for value in values(instructions, "FROM"):
        image, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()
        if image not in stages:
            low, high = re.findall(r"3\.(\d+)", PYPROJECT["project"]["requires-python"])
            [minor] = re.findall(r"^python:3\.(\d+)\.\d+-slim-\w+", image)
            assert int(low) <= int(minor) < int(high)
        stages.add(name)
    assert len(stages) == 3


def test_final_stage_runs_as_a_numeric_user_other_than_root(instructions) -> None:
    user = values(final_stage(instructions), "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_set_up_is_that_of_the_repository_and_stays_out_of_the_final_stage(instructions) -> None:
    [runs] = [v for v in values(instructions, "RUN") if "setup.sh" in v]
    assert "WITH=postgres bash scripts/setup.sh" in runs
    final = " ".join(line["content"] for line in final_stage(instructions))
    assert not re.search(r"\bpip\b|apt-get|\buv\b|setup\.sh", final)


def test_nothing_is_added_from_a_url(instructions) -> None:
    assert values(instructions, "ADD") == []


def copied(instructions: list[dict[str, Any]]) -> list[str]:
    """Return the paths of the repository that are copied into the image."""
    words = [v.split() for v in values(instructions, "COPY") if not v.startswith("--from")]
    return [source for copy in words for source in copy[:-1]]


def test_what_is_copied_exists_and_is_not_ignored(instructions) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    for source in copied(instructions):
        assert (ROOT / source).exists(), source
        assert any(source == a or source.startswith(f"{a}/") for a in allowed), source
    assert allowed == {a for a in allowed for s in copied(instructions) if s == a or s.startswith(f"{a}/")}


def test_every_package_is_in_the_image(instructions) -> None:
    packages = {p.removesuffix("*") for p in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied(final_stage(instructions)))
    assert {f"{p}/__init__.py" for p in packages} <= set(copied(instructions))
