"""``dvpo serve``: serve a run, a checkpoint or an export until interrupted."""

from __future__ import annotations

import io
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation

from actors.cluster.connect import connected
from dvpo_service import terminal
from dvpo_service.config import Config, load_config
from dvpo_service.errors import CheckpointError, ClusterError
from dvpo_service.export.export import Exported, export, open_export
from dvpo_service.export.states import is_export, newest
from dvpo_service.host.stopping import SIGNALS, Stopped
from dvpo_service.models.fixed_sequences import FILE, recorded
from dvpo_service.runs.settings import CONFIG_FILE
from dvpo_service.serving.deploy import Served, cpus_needed, deploy, free_listen_address, running, update
from dvpo_service.serving.http import ListenAddress


def servable(source: Path) -> Exported:
    """Return the newest state of a run, a checkpoint or an export, as an export to serve from.

    A checkpoint is exported to ``RUN/serving/``: every node of the cluster that sees the run sees this folder.

    Raises:
      CheckpointError: ``source`` holds nothing to serve.
    """
    _, folder = newest(source)
    if not is_export(folder):
        output = folder.parents[1] / "serving" / folder.name
        if not is_export(output):
            export(folder, output)
        folder = output
    recorded(folder)  # raises when the file is damaged
    return open_export(folder)


def run(source: Path, overrides: Sequence[str], *, follow: bool) -> None:
    """Serve a policy until interrupted.

    If our application already runs on the cluster, give it these weights and return. Its address and its API key
    stay the same.

    Args:
      source: folder of a run, a checkpoint or an export.
      overrides: changes to the run's config.
      follow: also serve newer checkpoints of the run as they appear.

    Raises:
      CheckpointError: ``source`` holds nothing to serve.
      ConfigError: an override is wrong, or the address cannot be listened on.
      ClusterError: the application does not start, or one that runs already does not answer.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    exported = servable(source)
    config = load_config(str(exported.folder / CONFIG_FILE), overrides)
    terminal.warn_of(config)
    if recorded(exported.folder) is None:
        terminal.say(f"note: {exported.folder} has no {FILE}, so nobody checks that the engine computes its model")
    served = Served.of(exported)
    cluster = config.cluster.model_copy(update={"num_cpus": config.cluster.num_cpus or math.ceil(cpus_needed(config))})
    with connected(config.model_copy(update={"cluster": cluster})):
        deployed = running()
        if deployed:
            before, address = deployed
            if why := update(config, before, served, address):
                raise CheckpointError(f"{served.version} is refused, {before.version} is served on: {why}")
            terminal.say(f"updated: {before.version} -> {served.version}")
            return
        with stopped_after():
            address = free_listen_address(config)
            serve.start(proxy_location=ProxyLocation.Disabled)
            terminal.say(f"starting {config.serve.min_replicas} vLLM engine(s) for {exported.folder} ...")
            deploy(config, served, address)
            terminal.serving(
                config, served.version, bool(served.critic), address.port, with_key=bool(address.key_digest)
            )
            _wait(config, source, served, address, follow)


def _wait(config: Config, source: Path, served: Served, address: ListenAddress, follow: bool) -> None:
    """Wait until interrupted. Report a newer state that cannot be exported or served once, and keep serving."""
    last_error, refused = "", served
    while True:
        time.sleep(config.serve.follow_every_s)
        if not follow:
            continue
        try:
            newer = Served.of(servable(source))
            if newer in (served, refused):
                continue
            if why := update(config, served, newer, address):
                refused = newer
                terminal.say(f"{newer.version} is refused, {served.version} is served on: {why}")
                continue
            terminal.say(f"updated: {served.version} -> {newer.version}")
            served = newer
        except (CheckpointError, ClusterError) as error:
            if str(error) != last_error:
                terminal.say(f"no newer weights than {served.version}: {error}")
            last_error = str(error)


@contextmanager
def stopped_after() -> Iterator[None]:
    """End Serve, its replicas and their engines when the block ends, on SIGTERM and Ctrl-C too; disconnect from Ray."""

    def stop(signum: int, frame: Any) -> None:
        raise Stopped("stopped serving", signum)

    for signum in SIGNALS:  # Ray installed its own handlers when it connected
        signal.signal(signum, stop)
    try:
        yield
    finally:
        # Serve's controller is ended on purpose. Until this process is disconnected, Ray prints to standard output that
        # calls to the controller failed and are retried for ever.
        with redirect_stdout(io.StringIO()):
            serve.shutdown()
            ray.shutdown()
