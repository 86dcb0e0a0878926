"""A cluster across a network: five hosts, one of them spare, each with its own address and files."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from moto.server import ThreadedMotoServer
from upath import UPath

from tests.builders import needs
from tests.e2e.netns import SUBNET, Host, Network, why_not
from tests.e2e.raycluster import BIN, ROOT, RayCluster, environment, free_port, wait_until
from tests.e2e.test_train import write_config

pytestmark = [pytest.mark.e2e, needs(why_not())]

BUCKET = "dvpo"
RUN = f"s3://{BUCKET}/runs/tiny"
BEGUN, STEPS = 4, 12


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as network:
        # The hosts have a /tmp of their own, so a clone below /tmp has to be shared with them.
        shared = [ROOT] if ROOT.is_relative_to("/tmp") else []
        for name in "abcde":
            network.host(name, shared)
        yield network


@pytest.fixture(scope="module")
def s3(network: Network) -> Iterator[dict[str, str]]:
    """An S3 server that the hosts can reach. Yields the environment variables for it."""
    port = free_port()
    server = ThreadedMotoServer(ip_address=f"{SUBNET}.1", port=port, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{SUBNET}.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        UPath(RUN).fs.mkdir(BUCKET)
        yield variables
    server.stop()


@pytest.fixture(scope="module")
def cluster(network: Network, s3: dict[str, str]) -> Iterator[RayCluster]:
    """A Ray cluster with every host as a node of two CPUs, and the S3 variables in its environment."""
    first, *others = network.hosts
    with RayCluster(ip=first.address) as cluster:
        cluster.start_head(cpus=2, inside=first.inside)
        for host in others:
            cluster.start_worker(cpus=2, ip=host.address, inside=host.inside)
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config in which no two of engine, critic and the policy's two ranks fit on one host of two CPUs."""
    tree = yaml.safe_load(write_config(tmp_path_factory.mktemp("config")).read_text())
    tree["policy"] |= {"world_size": 2}
    tree["cluster"] = {"cpus_per_trainer": 1.5, "cpus_per_engine": 2, "cpus_per_reward_worker": 0.5}
    tree["trainer"] = {"eval_every": 0, "save_every": 2}
    tree["tracking"] = {"mlflow": False}
    return yaml.safe_dump(tree)


def train(cluster: RayCluster, host: Host, config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `dvpo train` on ``host``, whose /tmp no other host sees. RAY_ADDRESS names the cluster."""
    host.run("bash", "-c", f"mkdir -p /tmp/mine && cat > /tmp/mine/tiny.yaml <<'END'\n{config}\nEND")
    more = {"RAY_ADDRESS": f"{cluster.ip}:{cluster.port}", "XDG_CACHE_HOME": "/tmp/mine/cache"}
    return subprocess.run(
        [*host.inside, str(BIN / "dvpo"), "train", "--config", "/tmp/mine/tiny.yaml", *arguments],
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_a_run_directory_that_other_hosts_do_not_see_is_one_line(
    cluster: RayCluster, network: Network, config: str
) -> None:
    done = train(cluster, network.hosts[0], config, "--run-dir", "/tmp/mine/runs/tiny", "trainer.num_steps=2")
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: node {SUBNET}.")
    assert "does not see the run directory /tmp/mine/runs/tiny" in last
    assert "s3://" in last


@pytest.fixture(scope="module")
def begun(cluster: RayCluster, network: Network, config: str) -> list[dict[str, Any]]:
    """The metrics of a run that the first host trained to step ``BEGUN``."""
    done = train(cluster, network.hosts[0], config, "--run-dir", RUN, f"trainer.num_steps={BEGUN}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
    return rows()


def rows(name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (UPath(RUN) / name).read_text().splitlines()]


def test_training_across_hosts(begun: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in begun] == list(range(BEGUN + 1))
    # The weights are exact. They went through the object store: engines cannot read files on a trainer's host.
    assert all(r["policy/rollout_kl"] < 1e-8 for r in begun[1:])
    shards = list((UPath(RUN) / f"checkpoints/step-{BEGUN:06d}/policy").iterdir())
    assert len(shards) == 2, "a file from each of the policy's ranks"


def test_a_cut_host_cannot_be_reached_until_it_is_joined(network: Network) -> None:
    """The network harness itself works."""
    a, b = network.hosts[:2]
    port = free_port()
    listening = subprocess.Popen([*b.inside, str(BIN / "python"), "-m", "http.server", str(port), "--bind", b.address])
    ask = f"import socket; socket.create_connection(('{b.address}', {port}), timeout=2)"

    def reached() -> bool:
        return subprocess.run([*a.inside, str(BIN / "python"), "-c", ask], capture_output=True).returncode == 0

    try:
        wait_until(reached, 30, "the server on b")
        network.cut(b)
        try:
            assert not reached()
        finally:
            network.join(b)
        assert reached()
    finally:
        listening.kill()
        listening.wait(10)


def test_nothing_is_left_on_the_hosts(cluster: RayCluster, begun: list[dict[str, Any]]) -> None:
    """When a run has ended, its engines and ranks are gone from every host; the cluster itself goes on."""
    left = [
        p.info["cmdline"]
        for p in psutil.process_iter(["cmdline"])
        if any("/tmp/mine" in part for part in p.info["cmdline"] or [])
    ]
    assert left == []
    assert not any(cluster.homes("Rank", "VllmEngine", "RewardWorker").values())


def test_hosts_have_files_of_their_own(network: Network) -> None:
    a, b = network.hosts[:2]
    for where in ("/tmp", "/dev/shm"):
        a.run("touch", f"{where}/only-a")
        assert subprocess.run([*b.inside, "test", "-e", f"{where}/only-a"]).returncode == 1
        assert not Path(where, "only-a").exists()


def test_another_host_with_nothing_but_the_url_goes_on_while_one_is_cut_off(
    cluster: RayCluster, network: Network, config: str, begun: list[dict[str, Any]]
) -> None:
    """Last in this file: the host that was cut off does not come back as a node."""
    host_of = {n["node_id"]: n["node_ip"] for n in json.loads(cluster.ray("list", "nodes", "--format", "json"))}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        arguments = ("--run-dir", RUN, f"trainer.num_steps={STEPS}")
        training = pool.submit(train, cluster, network.hosts[-1], config, *arguments)
        next_one = UPath(RUN) / f"checkpoints/step-{BEGUN + 2:06d}/state.json"
        wait_until(lambda: training.done() or next_one.exists(), 300, "the next checkpoint")
        assert not training.done(), training.result().stderr[-3000:]
        homes = {host_of[i] for i in cluster.homes("Rank")["Rank"]}
        # Neither the cluster's head nor the host that the job runs on.
        victim = next(h for h in network.hosts[1:-1] if h.address in homes)
        network.cut(victim)
        try:
            done = training.result(timeout=500)
        finally:
            network.join(victim)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"at step {BEGUN}" in done.stdout
    assert "restarting its group" in done.stdout, done.stdout[-3000:]
    assert [r["step"] for r in rows()] == list(range(STEPS + 1)), "each step once"
    assert rows()[: BEGUN + 1] == begun
    assert all(r["policy/rollout_kl"] < 1e-8 for r in rows()[1:])
    assert [r["step"] for r in rows("ledger.jsonl")] == list(range(STEPS)), "each step's prompts once"
    summary = json.loads((UPath(RUN) / "summary.json").read_text())
    assert summary["where"]["policy"] == f"{RUN}/policy"
    assert {"config.json", "model.safetensors"} <= {f.name for f in (UPath(RUN) / "policy").iterdir()}
