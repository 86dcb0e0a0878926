"""Compose file, manifests, guide and package agree on versions and images, and every command line can be parsed."""

from __future__ import annotations

import re

import click
import pytest
import typer
import yaml
from mlflow.cli import server as mlflow_server
from ray.dashboard.modules.job.cli import submit as ray_job_submit
from ray.scripts.scripts import start as ray_start

from dvpo_service import __version__
from dvpo_service.cli import app
from dvpo_service.config import load_config
from tests.docker.files import (
    COMPOSE,
    COMPOSE_GPU,
    DOCKER,
    KUBERAY,
    PYPROJECT,
    ROOT,
    guide_commands,
    manifest,
    pod_templates,
    programs,
    services,
)

DVPO = typer.main.get_command(app)
OTHERS: dict[tuple[str, ...], click.Command] = {
    ("ray", "start"): ray_start,
    ("ray", "job", "submit"): ray_job_submit,
    ("mlflow", "server"): mlflow_server,
}


def parsed(words: list[str]) -> None:
    """Parse a command line as its program would, without running it.

    Raises:
      click.ClickException: the arguments are wrong.
      KeyError: `dvpo` has no such command.
    """
    if words[0] == "dvpo":
        context = DVPO.commands[words[1]].make_context(words[1], list(words[2:]))
        if "config" in context.params:
            load_config(context.params["config"], context.params["overrides"] or [])
        return
    [(prefix, command)] = [(p, c) for p, c in OTHERS.items() if tuple(words[: len(p)]) == p]
    command.make_context(prefix[-1], list(words[len(prefix) :]))


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)[:60]) for words in programs()])
def test_command_line_parses(words: list[str]) -> None:
    parsed(words)


@pytest.mark.parametrize(
    "words", [["dvpo", "train"], ["dvpo", "train", "--config", "demo", "tracking.uri=x"], ["ray", "start", "--hed"]]
)
def test_a_wrong_command_line_is_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"Missing parameter: config|tracking\.uri|hed"):
        parsed(words)


def test_ray_start_params_are_options_of_ray_start() -> None:
    spec = manifest("raycluster.yaml")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        parsed(["ray", "start", "--head", *(f"--{key}={value}" for key, value in group["rayStartParams"].items())])


def test_ray_version_is_the_pinned_one() -> None:
    [pinned] = [re.search(r"^ray\[.*\]==([\d.]+)$", d) for d in PYPROJECT["project"]["dependencies"] if d[:4] == "ray["]
    assert manifest("raycluster.yaml")["spec"]["rayVersion"] == pinned[1]


def test_images_are_this_version_of_the_package() -> None:
    ours = {f"dvpo-service:{__version__}-{extra}" for extra in ("cpu", "gpu")}
    used = {s["image"] for files in ((COMPOSE,), (COMPOSE, COMPOSE_GPU)) for s in services(*files).values()}
    assert used - ours == {services()["database"]["image"]}
    assert {c["image"] for t in pod_templates().values() for c in t["spec"]["containers"]} == ours
    assert set(re.findall(r"dvpo-service:\S+", (DOCKER / "Dockerfile").read_text())) == ours
    image = yaml.safe_load((KUBERAY / "values.example.yaml").read_text())["image"]
    assert f"{image['repository']}:{image['tag']}" in ours


def test_database_is_pinned_to_a_minor_version() -> None:
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", services()["database"]["image"])


def test_pods_and_image_have_one_user() -> None:
    user, group = re.search(r"^USER (\d+):(\d+)$", (DOCKER / "Dockerfile").read_text(), re.M).groups()
    for template in pod_templates().values():
        security = template["spec"]["securityContext"]
        assert [security[k] for k in ("runAsUser", "runAsGroup", "fsGroup")] == [int(user), int(group), int(group)]


def test_ports_of_the_head_pod_are_those_of_compose() -> None:
    head = " ".join(services()["ray-head"]["command"])
    [container] = pod_templates()["head"]["spec"]["containers"]
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == {
        "gcs-server": int(re.search(r"--port=(\d+)", head)[1]),
        "dashboard": int(re.search(r"--dashboard-port=(\d+)", head)[1]),
    }


def test_pods_and_containers_get_the_same_environment() -> None:
    for template in pod_templates().values():
        names = {variable["name"] for variable in template["spec"]["containers"][0]["env"]}
        assert names == set(services()["worker"]["environment"])


def test_guide_names_files_that_exist() -> None:
    for command in guide_commands("docker") + guide_commands("kubectl"):
        for path in re.findall(r"(?:docker|scripts)/[\w./-]+", command):
            assert (ROOT / path).exists() or path == "docker/.env", command
