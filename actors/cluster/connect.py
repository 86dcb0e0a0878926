"""Connecting to the Ray cluster of a run, and checking that the run's plan fits there."""

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

from actors.cluster.placement import Bundle, alive_nodes, check_plan, local_cpus, local_gpus, plan_bundles
from dvpo_service.config import Config
from dvpo_service.config.exposure import dashboard_warning
from dvpo_service.errors import ClusterError, one_line
from dvpo_service.runs.directory import JOB_CONFIG

log = logging.getLogger(__name__)

TOKEN = secrets.token_hex(32)  # the auth token of every cluster that this process starts


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Connect this process to the run's Ray cluster for the duration of the block.

    The cluster is the one at ``cluster.address`` or RAY_ADDRESS. Without an address a cluster is started on this
    machine and ended after the block. Where this process is connected already, nothing happens.

    Raises:
      ClusterError: the cluster cannot be reached or started.
    """
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
    # Calls to a lost actor are abandoned on purpose. Its pool reports the loss in one line.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # A job on a cluster (`ray job submit`) gets the address in RAY_ADDRESS. Without one, start a cluster of our own
    # ("local"), also when another Ray cluster runs on this machine.
    address = _address(config)
    if address:
        _check_reachable(address)
    local: dict[str, Any] = (
        {}
        if address
        else {
            "num_cpus": config.cluster.num_cpus or local_cpus(plan_bundles(config)),
            "include_dashboard": False,
            # Ray then ends a worker's child processes with it: those of a reward function, and after a SIGKILL too.
            "_system_config": {"process_group_cleanup_enabled": True},
        }
    )
    with nullcontext() if address else _private_cluster():
        yield from _session(address, _without_job_variables(environment), local)


def _session(address: str | None, environment: dict[str, str], local: dict[str, Any]) -> Iterator[None]:
    """Connect, yield once, disconnect."""
    try:
        with _sigterm_handler_kept():
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
def _private_cluster() -> Iterator[None]:
    """Keep a cluster that starts and ends in this block on loopback, and have it require a token made here.

    By default all of Ray's ports are open to the network. On macOS and Windows Ray keeps them on loopback by itself, by
    the switch used here. The token covers what the switch does not: Ray Serve's replicas listen on all interfaces and
    unpickle what they receive, and other users of the machine can reach loopback too.
    """
    variables = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    if "RAY_AUTH_MODE" not in os.environ:
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        # The cluster's processes read the environment when they start. This process read it when it imported Ray, so
        # it has to be told.
        _authenticate("token")
    switch_before = ray_constants.ENABLE_RAY_CLUSTER
    variables_before = {name: os.environ.get(name) for name in variables}
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.update(variables)
    try:
        yield
    finally:
        if "RAY_AUTH_MODE" in variables:
            _authenticate("disabled")
        ray_constants.ENABLE_RAY_CLUSTER = switch_before
        for name, value in variables_before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _authenticate(mode: str) -> None:
    """Set how this process authenticates to a cluster: ``token`` or ``disabled``."""
    ray._config.initialize(json.dumps({"AUTH_MODE": mode}))


def on_cluster(config: Config) -> AbstractContextManager[None]:
    """Return ``connected(config)`` for a cluster that runs already, and an empty context where one is to be started.

    Inside it, the check of the plan and the training share one connection, so Ray counts them as one job.
    """
    return connected(config) if _needs_cluster(config) else nullcontext()


def _needs_cluster(config: Config) -> bool:
    """Return whether the run's actors go to a cluster that runs already; a run in one process has none."""
    return not config.cluster.in_process and _address(config) is not None


def _address(config: Config) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _without_job_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the job's own runtime_env does not set: Ray refuses to start when both set one."""
    job = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {k: v for k, v in variables.items() if k not in given}


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Restore our SIGTERM handler after ``ray.init``, whose own handler ends the process with nothing saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_reachable(address: str) -> None:
    """Raise ClusterError if the address cannot be reached. Ray itself waits for minutes, then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" or "local", which Ray resolves itself
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"cannot connect to Ray at {address}: {error.strerror or error}. Start a cluster with "
            "`ray start --head`, or leave cluster.address out to start one here"
        ) from error


def plan_fit(config: Config) -> str:
    """Return the run's bundles as text. Raises ClusterError, naming an actor that the cluster has no room for."""
    bundles = plan_bundles(config)
    if not _needs_cluster(config):
        here: Mapping[str, float] = {"CPU": config.cluster.num_cpus or local_cpus(bundles), "GPU": local_gpus()}
        check_plan(bundles, [here])
        return _on_this_machine(bundles)
    else:
        with connected(config):
            check_plan(bundles, alive_nodes())
    return _words(bundles)


def _words(bundles: list[Bundle]) -> str:
    return ", ".join(str(b) for b in bundles)


def _on_this_machine(bundles: list[Bundle]) -> str:
    """Return the bundles, and where they ask for more CPUs than there are, what that means here and on a cluster."""
    cores, asked = os.cpu_count() or 1, local_cpus(bundles)
    if asked <= cores:
        return _words(bundles)
    return (
        f"{_words(bundles)}; that is {asked} CPUs on {cores} cores: the cluster that a run starts here lets pools take "
        f"turns on them, one of your own does with `ray start --head --num-cpus={asked}`"
    )
