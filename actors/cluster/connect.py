"""The Ray cluster that a run uses, and whether its plan fits there."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from actors.cluster.placement import alive_nodes, check_plan, local_cpus, local_gpus, plan_bundles
from dvpo_service.config import Config
from dvpo_service.config.exposure import dashboard_warning
from dvpo_service.errors import ClusterError, one_line
from dvpo_service.runs.directory import JOB_CONFIG

log = logging.getLogger(__name__)

TOKEN = secrets.token_hex(32)  # of the clusters that this process starts


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """A Ray cluster for the run: the one at ``cluster.address``, or one started here and ended after."""
    environment = {
        # Several processes share the cores: threads that spin while they wait would starve the others.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_ENABLE_V2": "1",
    }
    if ray.is_initialized():
        yield
        return
    # Calls to a lost actor are abandoned on purpose; what became of them is told in one line by its pool.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # A job on a cluster (`ray job submit`) finds it in RAY_ADDRESS; otherwise start one, whatever else runs here.
    address = _address(config)
    if address:
        _check_reachable(address)
    local: dict[str, Any] = (
        {}
        if address
        else {
            "num_cpus": config.cluster.num_cpus or local_cpus(plan_bundles(config)),
            "include_dashboard": False,
            # A worker's own children end with it, also those of a reward function and of a SIGKILLed worker.
            "_system_config": {"process_group_cleanup_enabled": True},
        }
    )
    with nullcontext() if address else _closed_to_others():
        yield from _session(address, _beside_the_jobs(environment), local)


def _session(address: str | None, environment: dict[str, str], local: dict[str, Any]) -> Iterator[None]:
    """Connect, yield once, disconnect."""
    try:
        with _own_sigterm():
            context = ray.init(
                address=address or "local",
                runtime_env={"env_vars": environment},
                log_to_driver=bool(os.environ.get("DVPO_ACTOR_LOGS")),
                logging_level=logging.ERROR,
                **local,
            )
    except (ConnectionError, OSError, ValueError, AuthenticationError) as error:
        raise ClusterError(
            f"cannot connect to Ray at {address or 'this machine'}: {one_line(error, 200)}. "
            "Start a cluster with `ray start --head`, or leave cluster.address out to start one here; where the "
            "cluster has a token, give RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN"
        ) from error
    if warning := dashboard_warning(context.dashboard_url):
        log.warning("%s", warning)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """A cluster that starts and ends in this block is on loopback, and answers only those who hold a token made here.

    By default all of Ray's ports are open to the network. On macOS and Windows Ray keeps them on loopback by itself, by
    the switch used here. The token is for what the switch leaves: Ray Serve's replicas listen on all interfaces and
    unpickle what comes, and other users of the machine reach loopback too.
    """
    variables = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    if "RAY_AUTH_MODE" not in os.environ:
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        # The cluster's processes read the environment when they start; this one has when it imported Ray.
        _authenticate("token")
    before = ray_constants.ENABLE_RAY_CLUSTER, {name: os.environ.get(name) for name in variables}
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.update(variables)
    try:
        yield
    finally:
        if "RAY_AUTH_MODE" in variables:
            _authenticate("disabled")
        ray_constants.ENABLE_RAY_CLUSTER = before[0]
        for name, value in before[1].items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _authenticate(mode: str) -> None:
    """How this process presents itself to a cluster, ``token`` or ``disabled``."""
    ray._config.initialize(json.dumps({"AUTH_MODE": mode}))


def on_cluster(config: Config) -> AbstractContextManager[None]:
    """Connected from here on to a cluster that runs already; nothing where one is yet to be started.

    The check of the plan and the training then share a connection, as far as Ray is concerned one job.
    """
    return connected(config) if _address(config) else nullcontext()


def _address(config: Config) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _beside_the_jobs(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that the job's own runtime_env does not set: Ray refuses to start when both set one."""
    job = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {k: v for k, v in variables.items() if k not in given}


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """``ray.init`` puts its own handler for SIGTERM in place, which ends the process with nothing saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", "local": Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"cannot connect to Ray at {address}: {error.strerror or error}. Start a cluster with "
            "`ray start --head`, or leave cluster.address out to start one here"
        ) from error


def plan_fit(config: Config) -> str:
    """The plan in words. Raises ClusterError naming the actor that the cluster has no room for."""
    bundles = plan_bundles(config)
    if not _address(config):
        here: Mapping[str, float] = {"CPU": config.cluster.num_cpus or local_cpus(bundles), "GPU": local_gpus()}
        check_plan(bundles, [here])
    else:
        with connected(config):
            check_plan(bundles, alive_nodes())
    return ", ".join(str(b) for b in bundles)
