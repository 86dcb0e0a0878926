"""Deploy a trained policy and its critic on Ray Serve.

There are three deployments: ``gateway`` (HTTP), ``policy`` (vLLM engines) and ``values`` (the critic). The folders of
the weights are the ``user_config`` of ``policy`` and ``values``. Serving newer weights is therefore a lightweight
update of Ray Serve: the replicas stay and load the new folders.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ApplicationStatus

from dvpo_service.config import Config
from dvpo_service.errors import ClusterError, ConfigError, one_line
from dvpo_service.export.export import Exported
from dvpo_service.host.network import listen
from dvpo_service.serving.gateway import Gateway
from dvpo_service.serving.http import HttpServer, ListenAddress
from dvpo_service.serving.policy import PolicyServer
from dvpo_service.serving.replicas import Replicas
from dvpo_service.serving.value_server import ValueServer

APP = "dvpo"
KEY_VARIABLE = "DVPO_API_KEY"
READY_S = 60.0
ENVIRONMENT = {
    # Replicas share the cores: threads that spin while they wait would starve the other replicas.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # Ray Serve's own switches for throughput. Deployments call each other by gRPC. The router and our code run on the
    # replica's event loop, which our code never blocks. Ray Serve's defaults cost half of a gateway's CPU time.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
      policy: the absolute path of the policy's folder.
      critic: the absolute path of the critic's folder, or None without a critic.
      version: the name of these weights, such as ``step-000250``.
    """

    policy: str
    critic: str | None
    version: str

    @classmethod
    def of(cls, exported: Exported) -> Served:
        """Return what to serve of an export."""
        folder = exported.folder.absolute()
        critic = str(exported.critic.absolute()) if exported.critic else None
        return cls(str(folder), critic, f"step-{exported.step:06d}")


def application(config: Config, served: Served, address: ListenAddress) -> serve.Application:
    """Return the application: the gateway, which listens at ``address``, the policy, and the critic if there is one."""
    limits, cluster = config.serve, config.cluster
    name = limits.model_name or config.name
    current = asdict(served)
    code = _digest(config, name, bool(served.critic), address)
    policy = _deployment(
        PolicyServer,
        "policy",
        code,
        autoscaling_config=AutoscalingConfig(
            min_replicas=limits.min_replicas,
            max_replicas=limits.max_replicas,
            target_ongoing_requests=limits.target_requests,
        ),
        ray_actor_options=_resources(cluster.cpus_per_engine, cluster.gpus_per_engine),
        user_config=current,
        graceful_shutdown_timeout_s=limits.drain_timeout_s,
    )
    parts = [policy.bind(config, name)]
    if served.critic:
        values = _deployment(
            ValueServer,
            "values",
            code,
            num_replicas=limits.value_replicas,
            ray_actor_options=_resources(cluster.cpus_per_trainer, cluster.gpus_per_trainer),
            user_config=current,
        )
        parts.append(values.bind(config))
    gateway = _deployment(
        HttpServer,
        "gateway",
        code,
        num_replicas=limits.gateways,
        ray_actor_options=_resources(limits.cpus_per_gateway, 0) | {"resources": {f"node:{address.node}": 0.001}},
        user_config={},
        graceful_shutdown_timeout_s=limits.drain_timeout_s,
    )
    return gateway.bind(
        _gateway(config, name, bool(served.critic), address.key_digest), address, limits.drain_timeout_s, *parts
    )


def _deployment(server: type, name: str, code: str, **settings: Any) -> serve.Deployment:
    """Return a deployment whose version is ``code``, a digest of everything but the weights.

    Ray Serve keeps the replicas while the version stays the same. Without a version of ours, it gives each deploy a new
    one and replaces every replica, even when only ``user_config`` changed.
    """
    deployment = serve.deployment(
        name=name,
        health_check_period_s=5,
        # The gateway refuses requests beyond its own limit, so the number that reaches a replica is already bounded.
        max_ongoing_requests=100_000,
        graceful_shutdown_wait_loop_s=0.1,  # how often a replica that ends looks for requests under way; by default 2 s
        logging_config={"enable_access_log": False},
        **settings,
    )(server)
    return deployment.options(version=code, _internal=True)


def _digest(config: Config, *others: Any) -> str:
    """Return a digest of the settings that replicas are built with; it changes when replicas must be replaced.

    The rest of the config does not count: a newer run may have another number of steps. Nor do the path of the base
    model, and the server's host, port and polling interval, so that an update need not repeat them.
    """
    tree = config.model_dump(mode="json", include={"model", "rollout", "cluster", "serve"})
    del tree["model"]["path"], tree["serve"]["host"], tree["serve"]["port"], tree["serve"]["follow_every_s"]
    return hashlib.sha256(repr((tree, config.trainer.seed, *others)).encode()).hexdigest()[:12]


def _gateway(config: Config, name: str, with_critic: bool, key_digest: str | None) -> Callable[[], FastAPI]:
    """Return the function that a gateway replica calls to build its FastAPI app."""

    def build() -> FastAPI:
        def replicas(deployment: str) -> Replicas:
            handle = serve.get_deployment_handle(deployment, app_name=APP)
            return Replicas(handle, timeout_s=config.serve.request_timeout_s)

        values = replicas("values") if with_critic else None
        return Gateway(replicas("policy"), values, config.serve, name, key_digest).app()

    return build


def _resources(cpus: float, gpus: float) -> dict[str, Any]:
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


def cpus_needed(config: Config) -> float:
    """Return the number of logical CPUs for a cluster that is started for this server alone."""
    limits, cluster = config.serve, config.cluster
    return (
        limits.max_replicas * cluster.cpus_per_engine
        + limits.value_replicas * cluster.cpus_per_trainer
        + limits.gateways * limits.cpus_per_gateway
        + 1  # Serve's controller requests no CPU, but it uses some
    )


def api_key_digest() -> str | None:
    """Return the SHA-256 of the API key in the environment, or None without one. Replicas never receive the key."""
    key = os.environ.get(KEY_VARIABLE)
    return hashlib.sha256(key.encode()).hexdigest() if key else None


def free_listen_address(config: Config) -> ListenAddress:
    """Return the address where this server will listen, on this node.

    Raises:
      ConfigError: the host cannot be listened on, or the port is taken.
    """
    host, port = config.serve.host, config.serve.port
    try:
        with listen(host, port, shared=False) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another serve.port") from error
    return ListenAddress(host, port, ray.util.get_node_ip_address(), api_key_digest())


def deploy(config: Config, served: Served, address: ListenAddress) -> None:
    """Start to serve ``served``, or update the replicas that run already; return when every replica is ready.

    Raises:
      ClusterError: the replicas do not come up within ``serve.start_timeout_s``.
    """
    # Without a route, Ray Serve's proxy answers nothing: the gateways answer HTTP themselves.
    target = serve.RunTarget(application(config, served, address), name=APP, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    deadline = time.monotonic() + config.serve.start_timeout_s
    while (app := serve.status().applications[APP]).status != ApplicationStatus.RUNNING:
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ClusterError(f"serving did not start: {_why(app)}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"not serving after serve.start_timeout_s = {config.serve.start_timeout_s:g} s: {_why(app)}"
            )
        time.sleep(0.2)


def _why(app: Any) -> str:
    parts = [f"{name}: {d.status} {d.message}" for name, d in app.deployments.items() if d.message]
    return one_line(f"{app.message} {'; '.join(parts)}", 600)


def update(config: Config, before: Served, newer: Served, address: ListenAddress) -> str | None:
    """Serve ``newer`` in place of ``before``; return when every replica is ready.

    Returns:
      None, or why the replicas refuse the new weights; ``before`` is served on.

    Raises:
      ClusterError: the replicas do not come up within ``serve.start_timeout_s``; ``before`` is deployed again.
    """
    try:
        deploy(config, newer, address)
        why = _state()["refused"]
    except ClusterError:
        deploy(config, before, address)
        raise
    if why:
        deploy(config, before, address)
    return why


def running() -> tuple[Served, ListenAddress] | None:
    """Return what our application on this cluster serves and where, or None when it does not run.

    Raises:
      ClusterError: the application exists but does not answer.
    """
    app = serve.status().applications.get(APP)
    if app is None or app.status not in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING):
        return None
    served = Served(**_state()["served"])
    return served, _ask("gateway", "ready")


def _state() -> Any:
    return _ask("policy", "state")


def _ask(deployment: str, method: str) -> Any:
    handle = serve.get_deployment_handle(deployment, app_name=APP)
    try:
        return getattr(handle, method).remote().result(timeout_s=READY_S)
    except TimeoutError as error:
        raise ClusterError(
            f"a server runs on this cluster, but it did not answer within {READY_S:g} s; see `serve status`, "
            "wait until it is up, or end it with `serve shutdown`"
        ) from error
