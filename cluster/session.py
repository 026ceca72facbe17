"""A run on a cluster, from the connection to the pool: what can be wrong there is found here, in seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.encoder_group import EncoderGroup, bundles
from cluster.metrics import Gauges
from cluster.placement import Allotment, allot, fits, shortage
from cluster.pool import RayPool, everywhere
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import CapacityError, ConfigError, DataError
from talk_dist.models.encoder import load_encoder
from talk_dist.models.protocol import Encoder
from talk_dist.runtime.callbacks import Callback
from talk_dist.runtime.estimate import Plan

PACKAGES = ("torch", "transformers", "numpy", "ray")
HERE = ("", "local")  # addresses that mean a Ray of our own


@contextmanager
def open_session(config: DistillConfig) -> Iterator[RaySession]:
    """A connection to the cluster that ``config.cluster`` names, or to a Ray started here for this run.

    Raises ConfigError, within seconds, if there is none, or it does not let us in.
    """
    with ExitStack() as stack:
        address, own = config.cluster.address or os.environ.get("RAY_ADDRESS", ""), False
        if not ray.is_initialized():
            _connect(address)
            stack.callback(ray.shutdown)
            own = address in HERE
        yield RaySession(config, stack, own)


class RaySession:
    """Makes what a run needs: an encoder, a pool, callbacks. Everything is closed with the session.

    ``own``: this Ray was started here for this run, so that nobody will add a node to it.
    """

    def __init__(self, config: DistillConfig, stack: ExitStack, own: bool = False):
        self.config, self.stack, self.own = config, stack, own
        gauges = Gauges()
        stack.callback(gauges.close)
        self.callbacks: Sequence[Callback] = [gauges]

    def encoder(self) -> Encoder:
        """The language model of the driver, or the group that has it. Raises CapacityError if there is no room."""
        if not self.config.deepspeed.workers:
            return load_encoder(self.config.encoder)
        workers = bundles(self.config.deepspeed)
        self.refuse_if_hopeless(
            workers, "the encoder workers", "lower deepspeed.workers, deepspeed.cpus or deepspeed.gpus"
        )
        group = EncoderGroup(
            self.config.encoder,
            self.config.deepspeed,
            threads=self.config.runtime.threads or 1,
            wait_seconds=self.config.cluster.wait_seconds,
        )
        self.stack.callback(group.close)
        return group

    def pool(self, tag: PreparedTag, encoder: Encoder, plan: Plan, threads: int = 0) -> RayPool:
        """The shards of ``tag`` in actors. ``plan``: what an actor with some parts needs; ``threads``: of each where
        the settings leave them open, on whatever share of the cores.

        Raises ConfigError or DataError if a node could not work for us, CapacityError if there is no room.
        """
        config, allotment = self.config, self.allotment(tag, plan)
        if threads and not config.runtime.threads:
            allotment = replace(allotment, threads=threads)
        settings = "lower cluster.actors, cluster.cpus, cluster.gpus or cluster.memory_gib"
        self.refuse_if_hopeless([*allotment.bundles, *bundles(config.deepspeed)], "the shards", settings)
        check_nodes(tag, config.cluster.wait_seconds)
        group = encoder if isinstance(encoder, EncoderGroup) else None
        pool = RayPool(tag, config.encoder, config.kernel, config.runtime, config.cluster, allotment, group)
        self.stack.callback(pool.close)
        return pool

    def allotment(self, tag: PreparedTag, plan: Plan, runs: int = 1) -> Allotment:
        """What the shards of ``tag`` get where ``runs`` share the cluster."""
        nodes = [{"CPU": 0.0, "GPU": 0.0} | node["Resources"] for node in ray.nodes() if node["Alive"]]
        asked, cluster = self.config.deepspeed, self.config.cluster
        if not cluster.cpus and not self.config.runtime.threads and not any(node["CPU"] for node in nodes):
            print(
                "no node of the cluster has cores yet, so every actor asks for one and for no GPU: say what your nodes "
                "have with --cluster.cpus and --cluster.gpus",
                file=sys.stderr,
            )
        for _ in range(asked.workers * runs):  # they have their share already
            richest = max(nodes, key=lambda node: (node["GPU"] if asked.gpus else 0, node["CPU"]))
            richest["CPU"], richest["GPU"] = richest["CPU"] - asked.cpus, richest["GPU"] - asked.gpus

        def memory(parts: Sequence[int]) -> int:
            return plan.actor(parts, asked.encode_texts).host

        return allot(tag.num_parts, nodes, self.config.runtime, cluster, memory, runs)

    def refuse_if_hopeless(self, asked: Sequence[dict[str, float]], what: str, remedy: str) -> None:
        """Raises CapacityError at once if a Ray of our own is too small for the bundles that are ``asked`` of it."""
        if self.own and not fits(asked, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
            raise CapacityError(
                f"{shortage(asked, what)}. Nothing can join a Ray that was started for this run: {remedy}, or run on "
                "a cluster (cluster.address)"
            )


def _connect(address: str) -> None:
    if address.startswith(("ray://", "http://", "https://")):
        raise ConfigError(
            f"cluster.address = {address!r}: the driver must run in the cluster. "
            f"Submit it as a job: python -m cluster.submit --address http://HEAD:8265 --config run.yaml"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address not in (*HERE, "auto"):
            _knock(address)
        with _own_signals():
            if address in HERE:
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
    except (ConnectionError, AuthenticationError) as error:
        raise _locked_out(address, _first_line(error)) from error
    except RuntimeError as error:
        if "ersion" not in str(error):
            raise
        raise ConfigError(f"cluster.address = {address!r}: {_first_line(error)}; install the same versions") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """What SIGINT and SIGTERM do stays as it is: Ray's own handler of SIGTERM aborts the driver with a stack trace."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _knock(address: str) -> None:
    """Raises ConfigError at once where Ray itself would try for twenty seconds and not say why it gave up."""
    remedy = "give host:port of a Ray head (its port is 6379 unless it was started with another), or leave it empty "
    remedy += "to start a Ray here"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cluster.address = {address!r}: nothing answers there ({error}); {remedy}") from error
    try:
        from ray._private.grpc_utils import grpc, init_grpc_channel
    except ImportError:  # it is not public; without it, Ray itself finds out
        return
    with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId", lambda nothing: nothing, bytes)
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            code, told = error.code(), error.details()
            if code is grpc.StatusCode.UNAUTHENTICATED:
                raise _locked_out(address, told) from error
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                message = f"cluster.address = {address!r}: what answers there is no Ray head ({told}); {remedy}"
                raise ConfigError(message) from error


def _locked_out(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"cluster.address = {address!r}: no Ray cluster lets us in there ({reason}). Start one "
        "(`ray start --head`), or set RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are set on its head"
    )


def check_nodes(tag: PreparedTag, wait_seconds: float) -> None:
    """Every node must have our packages, our code, and see the same prepared graph.

    Raises one ConfigError or DataError that lists every node where something is different, or that is not ready after
    ``wait_seconds``: a runtime environment may install packages first.
    """
    path = everywhere(tag.path)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    probe = ray.remote(num_cpus=0, max_retries=0)(_prober())
    refs = {
        node["NodeManagerAddress"] + "/" + node["NodeID"][:6]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(path, PACKAGES)
        for node in nodes
    }
    replies: dict[str, Any] = {}
    end = time.monotonic() + wait_seconds
    for name, ref in refs.items():
        try:
            replies[name] = ray.get(ref, timeout=max(0.0, end - time.monotonic()))
        except GetTimeoutError:
            ray.cancel(ref)
            late = f"it is not ready after {wait_seconds:.0f} s; if it installs packages, raise cluster.wait_seconds"
            replies[name] = {"error": late}
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
        for package, module in (("talk_dist", "talk_dist"), ("cluster", "cluster.actors")):
            try:  # of cluster a module: any folder of that name passes for a package without one
                found = importlib.util.find_spec(module)
            except ModuleNotFoundError:
                found = None
            if found and found.origin:
                for file in sorted(Path(found.origin).parent.rglob("*.py")):
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
