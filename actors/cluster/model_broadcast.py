"""Sending the base model's folder to the nodes of a run, and checking that they share the run directory."""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from dvpo_service.errors import ClusterError, describe_error, one_line

log = logging.getLogger(__name__)

LARGEST = 4 * 2**30  # bytes; a larger model should lie on shared storage and not pass through Ray's object store
BROADCAST_S = 600.0  # deadline of a call on all nodes


def broadcast_model(path: str, nodes: Iterable[str]) -> None:
    """Copy the model folder of this machine to every node that lacks it, at the same path.

    Does nothing for a hub name, which each node downloads by itself.

    Args:
      path: a model folder on this machine, or a hub name.
      nodes: Ray node ids.

    Raises:
      ClusterError: a node has other files at the path, cannot write there, or the folder is larger than ``LARGEST``.
    """
    folder = Path(path)
    away = [n for n in nodes if n != ray.get_runtime_context().get_node_id()]
    if not away or not folder.is_dir():
        return
    wanted = listing(folder)
    answers = ray.get([_on(n, listing).remote(folder) for n in away], timeout=BROADCAST_S)
    listings = dict(zip(away, answers, strict=True))
    if other := [n for n, files in listings.items() if files not in (None, wanted)]:
        raise ClusterError(
            f"the model folder {path} on node {address(other[0])} holds other files than here; make them equal, "
            "or remove it there and it is copied"
        )
    lacking = [n for n, files in listings.items() if files is None]
    if not lacking:
        return
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if size > LARGEST:
        raise ClusterError(
            f"node {address(lacking[0])} has no {path}, and its {size / 2**30:.1f} GiB are too much to send; "
            "put the model on storage that every node sees, or give a hub name"
        )
    content = ray.put(packed(folder))
    failures = ray.get([_on(n, unpack).remote(folder, content) for n in lacking], timeout=BROADCAST_S)
    for node, why in zip(lacking, failures, strict=True):
        if why:
            raise ClusterError(f"node {address(node)} cannot take a copy of the model {path}: {why}")


def broadcast_to_spares(path: str, used: Iterable[str]) -> None:
    """Copy the model folder to the nodes that the run does not use; actors move there when their node is lost.

    A failure is only logged.

    Args:
      path: a model folder on this machine, or a hub name.
      used: ids of the nodes that the run uses.
    """
    taken = set(used)
    spares = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in taken]
    try:
        broadcast_model(path, spares)
    except (ClusterError, RayError) as error:
        log.warning("a spare node will not be of use: %s", one_line(error))


def check_shared(place: Path | UPath, nodes: Iterable[str]) -> None:
    """Raise ClusterError when a node does not see what the driver writes to the run directory."""
    away = sorted(set(nodes) - {ray.get_runtime_context().get_node_id()})
    if not away:
        return
    marker = place / f".seen-{uuid.uuid4().hex[:12]}"
    token = uuid.uuid4().hex
    marker.write_text(token)
    try:
        texts = ray.get([_on(n, read_text).remote(str(marker)) for n in away], timeout=BROADCAST_S)
    finally:
        marker.unlink()
    for node, text in zip(away, texts, strict=True):
        if text != token:
            raise ClusterError(
                f"node {address(node)} does not see the run directory {place} ({text}), where its ranks would write "
                "checkpoints; give --run-dir on storage that every node mounts at that path, or s3://BUCKET/NAME"
            )


def listing(folder: Path) -> dict[str, int] | None:
    """Return the files below ``folder`` with their sizes in bytes, or None if there is no such folder."""
    if not folder.is_dir():
        return None
    return {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}


def packed(folder: Path) -> bytes:
    """Return the folder's content as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=".")
    return buffer.getvalue()


def unpack(folder: Path, content: bytes) -> str | None:
    """Write the folder from a tar archive, completely or not at all. A folder that exists already is kept.

    Returns:
      None, or why the folder could not be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        return error.strerror or str(error)
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(temporary, filter="data")
        temporary.chmod(0o755)
        if not folder.is_dir():  # another Ray node on this machine may have been faster
            temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            return error.strerror or str(error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def read_text(path: str) -> str:
    """Return the file's text, or why it cannot be read. Every kind of storage raises errors of its own."""
    try:
        return UPath(path).read_text()
    except Exception as error:  # noqa: BLE001 - the text goes into the error that the user sees
        return describe_error(error, 200)


def address(node: str) -> str:
    """Return the node's IP address for an error message, or its id if the address is not known."""
    return next((n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node), node)


def _on(node: str, function: Any) -> Any:
    """Return ``function`` as a Ray task that runs on ``node``."""
    return ray.remote(function).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
