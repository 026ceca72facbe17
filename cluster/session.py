"""A run on a cluster, from the connection to the pool: what can be wrong there is found here, in seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.encoder_group import EncoderGroup
from cluster.metrics import Gauges
from cluster.placement import allot
from cluster.pool import RayPool
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError, DataError
from talk_dist.models.encoder import load_encoder
from talk_dist.models.protocol import Encoder
from talk_dist.runtime.callbacks import Callback

PACKAGES = ("torch", "transformers", "numpy", "ray")
PROBE_SECONDS = 60


@contextmanager
def open_session(config: DistillConfig) -> Iterator[RaySession]:
    """A connection to the cluster that ``config.cluster`` names, or to a Ray started here for this run.

    Raises ConfigError, within seconds, if there is none, or it does not let us in.
    """
    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(config.cluster.address or os.environ.get("RAY_ADDRESS", ""))
            stack.callback(ray.shutdown)
        yield RaySession(config, stack)


class RaySession:
    """Makes what a run needs: an encoder, a pool, callbacks. Everything is closed with the session."""

    def __init__(self, config: DistillConfig, stack: ExitStack):
        self.config, self.stack = config, stack
        self._group: EncoderGroup | None = None
        self.callbacks: Sequence[Callback] = [Gauges()]

    def encoder(self) -> Encoder:
        """The language model of the driver, or the group that has it."""
        if not self.config.deepspeed.workers:
            return load_encoder(self.config.encoder)
        group = EncoderGroup(
            self.config.encoder,
            self.config.deepspeed,
            threads=self.config.runtime.threads or 1,
            wait_seconds=self.config.cluster.wait_seconds,
        )
        self.stack.callback(group.close)
        self._group = group
        return group

    def pool(self, tag: PreparedTag, encoder: Encoder, memory: Callable[[Sequence[int]], int]) -> RayPool:
        """The shards of ``tag`` in actors. ``memory``: bytes that an actor with these parts needs, for each.

        Raises ConfigError or DataError if a node could not work for us, CapacityError if there is no room.
        """
        check_nodes(tag)
        config = self.config
        nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        for _ in range(config.deepspeed.workers):  # they have their share already
            richest = max(nodes, key=lambda node: node.get("CPU", 0))
            richest["CPU"] = richest.get("CPU", 0) - config.deepspeed.cpus
        allotment = allot(tag.num_parts, nodes, config.runtime, config.cluster, memory)
        pool = RayPool(tag, config.encoder, config.kernel, config.runtime, config.cluster, allotment, self._group)
        self.stack.callback(pool.close)
        return pool


def _connect(address: str) -> None:
    if address.startswith(("ray://", "http://", "https://")):
        raise ConfigError(
            f"cluster.address = {address!r}: the driver must run in the cluster. "
            f"Submit it as a job: python -m cluster.submit --address http://HEAD:8265 --config run.yaml"
        )
    if address not in ("", "auto", "local"):
        _knock(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address in ("", "local"):
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, AuthenticationError) as error:
        raise ConfigError(
            f"cluster.address = {address!r}: no Ray cluster lets us in there ({_first_line(error)}). Start one "
            "(`ray start --head`), or set RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are set on its head"
        ) from error
    except RuntimeError as error:
        if "ersion" not in str(error):
            raise
        raise ConfigError(f"cluster.address = {address!r}: {_first_line(error)}; install the same versions") from error


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cluster.address = {address!r}: nothing answers there ({error}); give host:port of a Ray head "
            "(its port is 6379 unless it was started with another), or leave it empty to start a Ray here"
        ) from error


def check_nodes(tag: PreparedTag) -> None:
    """Every node must have our packages, our code, and see the same prepared graph.

    Raises one ConfigError or DataError that lists every node where something is different.
    """
    path = os.path.abspath(os.path.expanduser(tag.path)) if "://" not in tag.path else tag.path
    nodes = [node for node in ray.nodes() if node["Alive"]]
    probe = ray.remote(num_cpus=0, max_retries=0)(_prober())
    refs = {
        node["NodeManagerAddress"] + "/" + node["NodeID"][:6]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(path, PACKAGES)
        for node in nodes
    }
    replies: dict[str, Any] = {}
    for name, ref in refs.items():
        try:
            replies[name] = ray.get(ref, timeout=PROBE_SECONDS)
        except RayError as error:
            replies[name] = {"error": _first_line(error)}
    problems = compare(replies, _prober()(path, PACKAGES), storage.read_bytes(storage.join(path, "META.json")), path)
    if problems:
        raise DataError("the cluster", problems)


def compare(replies: dict[str, Any], ours: dict[str, Any], meta: bytes, path: str) -> list[str]:
    """What is different on which node, in words."""
    problems = []
    for node, theirs in replies.items():
        if "error" in theirs:
            problems.append(f"node {node} cannot run our code: {theirs['error']}")
            continue
        for name, version in ours["versions"].items():
            if theirs["versions"][name] != version:
                there = theirs["versions"][name] or "no"
                remedy = "install the same version there (an image, or pip in the runtime_env)"
                problems.append(f"node {node} has {there} {name}, the driver has {version}: {remedy}")
        if theirs["meta"] is None:
            remedy = "put it on storage that every node sees (NFS, s3://, gs://)"
            problems.append(f"node {node} does not see {path}: {remedy}")
        elif theirs["meta"] != meta:
            remedy = "copy the same one to every node, or use shared storage"
            problems.append(f"node {node} has another prepared graph at {path}: {remedy}")
    return problems


def _prober() -> Callable[[str, Sequence[str]], dict[str, Any]]:
    """A function that Ray ships by value, since a node may lack our packages: it imports what it needs itself."""

    def probe(path: str, packages: Sequence[str]) -> dict[str, Any]:
        import hashlib

        from pyarrow import fs

        versions: dict[str, str | None] = {"Python": ".".join(platform.python_version_tuple()[:2])}
        for name in packages:
            try:
                versions[name] = importlib.metadata.version(name).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        digest = hashlib.sha256()
        for package in ("talk_dist", "cluster"):
            found = importlib.util.find_spec(package)
            for folder in (found.submodule_search_locations or []) if found else []:
                for file in sorted(Path(folder).rglob("*.py")):
                    digest.update(file.read_bytes())
            versions[package] = f"version {digest.hexdigest()[:8]} of" if found else None
        filesystem, inside = fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
        try:
            with filesystem.open_input_file(f"{inside}/META.json") as file:
                meta = bytes(file.read())
        except OSError:
            meta = None
        return {"versions": versions, "meta": meta}

    return probe


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "Error:" in line and not line.startswith("File")]
    return (wanted[-1:] or lines[:1] or [type(error).__name__])[0][:300]
