"""``dvpo serve``: serve a run, a checkpoint or an export until interrupted."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import ProxyLocation

from actors.cluster.connect import connected
from dvpo_service import terminal
from dvpo_service.config import Config, load_config
from dvpo_service.errors import CheckpointError, ClusterError
from dvpo_service.export.export import CONFIG_FILE, Exported, export, is_export, newest, open_export
from dvpo_service.host.stopping import SIGNALS, Stopped
from dvpo_service.serving.deploy import Served, cpus_needed, deploy, free_listen_address, running
from dvpo_service.serving.http import ListenAddress


def servable(source: Path) -> Exported:
    """The newest state of a run, a checkpoint or an export, as a folder to serve from.

    A checkpoint is exported to ``RUN/serving/``, which every node of a cluster sees when it sees the run.

    Raises CheckpointError.
    """
    _, folder = newest(source)
    if is_export(folder):
        return open_export(folder)
    output = folder.parents[1] / "serving" / folder.name
    return open_export(output) if is_export(output) else export(folder, output)


def run(source: Path, overrides: Sequence[str], *, follow: bool) -> None:
    """Serve until interrupted. Where our application runs on the cluster already, give it these weights and return:
    it stays at its address, and asks for the key that it asked for.

    With ``follow``, newer checkpoints of the run are served as they appear.

    Raises CheckpointError, ConfigError, ClusterError.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    exported = servable(source)
    config = load_config(str(exported.folder / CONFIG_FILE), overrides)
    terminal.warn_of(config)
    served = Served.of(exported)
    cluster = config.cluster.model_copy(update={"num_cpus": config.cluster.num_cpus or math.ceil(cpus_needed(config))})
    with connected(config.model_copy(update={"cluster": cluster})):
        if found := running():
            before, address = found
            deploy(config, served, address)
            terminal.say(f"updated: {before} -> {served.version}")
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
    """Until interrupted. A newer state that cannot be exported or served is said, once, and serving goes on."""
    said = ""
    while True:
        time.sleep(config.serve.follow_every_s)
        if not follow:
            continue
        try:
            newer = Served.of(servable(source))
            if newer != served:
                deploy(config, newer, address)
                terminal.say(f"updated: {served.version} -> {newer.version}")
                served = newer
        except (CheckpointError, ClusterError) as error:
            if str(error) != said:
                terminal.say(f"no newer weights than {served.version}: {error}")
            said = str(error)


@contextmanager
def stopped_after() -> Iterator[None]:
    """End Serve, its replicas and their engines when the block ends, on SIGTERM and Ctrl-C too."""

    def stop(signum: int, frame: Any) -> None:
        raise Stopped("stopped serving", signum)

    for signum in SIGNALS:  # Ray put its own there when it connected
        signal.signal(signum, stop)
    try:
        yield
    finally:
        serve.shutdown()
