"""compose.yaml, as Docker Compose resolves it."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.docker.files import COMPOSE, COMPOSE_GPU, DOCKER, compose, services, tool

OPTIONS = re.compile(r"--([\w-]+)=(\S+)")


def options(service: str) -> dict[str, str]:
    return dict(OPTIONS.findall(" ".join(services()[service]["command"])))


def test_everything_is_published_on_loopback_only() -> None:
    ports = [port for s in services().values() for port in s.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert {port["target"] for port in ports} == {8265, 5000, 8000}


def test_the_database_is_reached_by_mlflow_alone_and_published_nowhere() -> None:
    assert "ports" not in services()["database"]
    assert compose()["networks"]["database"]["internal"]
    assert {name for name, s in services().items() if "database" in s["networks"]} == {"database", "mlflow"}


def test_every_service_that_stays_has_a_health_check_and_every_wait_is_for_health() -> None:
    for name, service in services().items():
        assert ("healthcheck" in service) == (name != "train"), name
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy", (name, needed)


def test_ports_agree() -> None:
    head, train = options("ray-head"), " ".join([*services()["train"]["entrypoint"], *services()["train"]["command"]])
    assert options("worker")["address"] == f"ray-head:{head['port']}"
    assert f"--address=http://ray-head:{head['dashboard-port']}" in train
    assert f":{head['dashboard-port']}/" in str(services()["ray-head"]["healthcheck"]["test"])
    mlflow = services()["mlflow"]["command"]
    port = mlflow[mlflow.index("--port") + 1]
    assert f"tracking.mlflow_uri=http://mlflow:{port}" in train
    assert f"mlflow:{port}" in mlflow[mlflow.index("--allowed-hosts") + 1].split(",")
    assert f":{port}/health" in str(services()["mlflow"]["healthcheck"]["test"])


@pytest.mark.parametrize("node", ["ray-head", "worker"])
def test_nodes_see_the_same_runs_and_have_room_for_their_objects(node: str) -> None:
    service = services()[node]
    assert [(v["source"], v["target"]) for v in service["volumes"]] == [("runs", "/runs")]
    assert 2 * int(options(node)["object-store-memory"]) <= int(service["shm_size"])


def test_env_example_names_exactly_the_variables_that_are_read() -> None:
    read = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    assert read == set(re.findall(r"^(\w+)=", (DOCKER / ".env.example").read_text(), re.M))


def test_env_example_repeats_the_defaults() -> None:
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text()))
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.M))
    assert defaults == {name: example[name] for name in defaults}


def test_without_a_password_compose_says_what_to_do() -> None:
    refused = subprocess.run(
        [tool("docker-compose"), "--env-file", str(DOCKER / ".env.example"), "--file", str(COMPOSE), "config", "-q"],
        env={"PATH": "/usr/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "copy docker/.env.example to docker/.env" in refused.stderr


@pytest.mark.parametrize("name", ["ray-head", "worker", "mlflow", "train", "serve"])
def test_the_gpu_override_changes_image_and_devices_alone(name: str) -> None:
    cpu, gpu = services(COMPOSE)[name], services(COMPOSE, COMPOSE_GPU)[name]
    assert gpu["image"] == cpu["image"].replace("-cpu", "-gpu")
    assert (cpu["build"]["args"], gpu["build"]["args"]) == ({"EXTRA": "cpu"}, {"EXTRA": "gpu"})
    assert {k: v for k, v in cpu.items() if k not in ("image", "build", "deploy")} == {
        k: v for k, v in gpu.items() if k not in ("image", "build", "deploy")
    }
    takes_gpus = "resources" in gpu.get("deploy", {})
    assert takes_gpus == (name in ("worker", "serve"))
