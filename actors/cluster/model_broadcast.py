"""Folders that every node of a run must have: a base model made on the driver's machine, a run directory."""

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

LARGEST = 4 * 2**30  # bytes that travel through Ray's object store; more should lie on shared storage
BROADCAST_S = 600.0


def broadcast_model(path: str, nodes: Iterable[str]) -> None:
    """Make the model folder of this machine be on every node, at the same path; a hub name is each node's to get.

    Raises ClusterError: a node has another folder there, cannot write it, or the folder is too large to send.
    """
    folder = Path(path)
    away = [n for n in nodes if n != ray.get_runtime_context().get_node_id()]
    if not away or not folder.is_dir():
        return
    wanted = listing(folder)
    there = dict(zip(away, ray.get([_on(n, listing).remote(folder) for n in away], timeout=BROADCAST_S), strict=True))
    if other := [n for n, found in there.items() if found not in (None, wanted)]:
        raise ClusterError(
            f"the model folder {path} on node {address(other[0])} holds other files than here; make them equal, "
            "or remove it there and it is copied"
        )
    lacking = [n for n, found in there.items() if found is None]
    if not lacking:
        return
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if size > LARGEST:
        raise ClusterError(
            f"node {address(lacking[0])} has no {path}, and its {size / 2**30:.1f} GiB are too much to send; "
            "put the model on storage that every node sees, or give a hub name"
        )
    content = ray.put(packed(folder))
    failed = ray.get([_on(n, unpack).remote(folder, content) for n in lacking], timeout=BROADCAST_S)
    for node, why in zip(lacking, failed, strict=True):
        if why:
            raise ClusterError(f"node {address(node)} cannot take a copy of the model {path}: {why}")


def broadcast_to_spares(path: str, used: Iterable[str]) -> None:
    """The same for the cluster's other nodes, to which actors move when theirs is lost. What fails is logged alone."""
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
    marker, token = place / f".seen-{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
    marker.write_text(token)
    try:
        seen = ray.get([_on(n, read_text).remote(str(marker)) for n in away], timeout=BROADCAST_S)
    finally:
        marker.unlink()
    for node, found in zip(away, seen, strict=True):
        if found != token:
            raise ClusterError(
                f"node {address(node)} does not see the run directory {place} ({found}), where its ranks would write "
                "checkpoints; give --run-dir on storage that every node mounts at that path, or s3://BUCKET/NAME"
            )


def listing(folder: Path) -> dict[str, int] | None:
    """Files below ``folder`` and their sizes; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}


def packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=".")
    return buffer.getvalue()


def unpack(folder: Path, content: bytes) -> str | None:
    """Write a packed folder, whole or not at all; why it could not be, if so."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        return error.strerror or str(error)
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(beside, filter="data")
        beside.chmod(0o755)
        if not folder.is_dir():  # another node of this machine may have been faster
            beside.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            return error.strerror or str(error)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return None


def read_text(path: str) -> str:
    """The file's text, or why it cannot be read: storage fails in as many ways as there are kinds of it."""
    try:
        return UPath(path).read_text()
    except Exception as error:  # noqa: BLE001 - told to the person whose storage it is
        return describe_error(error, 200)


def address(node: str) -> str:
    """The node's IP address, for a person."""
    return next((n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node), node)


def _on(node: str, function: Any) -> Any:
    return ray.remote(function).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
