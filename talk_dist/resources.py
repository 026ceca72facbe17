"""Settings that say where a run lives: processes, cores, GPUs, memory. The mathematics does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from talk_dist.schema import at_least, check, check_types, positive


@dataclass(frozen=True)
class RuntimeConfig:
    """One process, or actors on a Ray cluster."""

    kind: Literal["local", "ray"] = "local"
    """`local`: all shards in this process. `ray`: each shard in an actor, as `cluster` says."""
    threads: int = 0
    """Threads of every process (0: all cores; with ray, an actor's share of them). Part of the configuration
    because it changes the last bits."""
    cache: bool = True
    """Keep the frozen encoder's encodings, for later runs."""
    cache_folder: str = ""
    """Where they are kept: runs on several splits of a graph can share them. Empty: beside the prepared TAG."""
    scratch: str = ""
    """With `kernel.fields: disk`, a local folder for them; empty: the system's for temporary files."""

    def __post_init__(self) -> None:
        check_types("runtime", self)
        check("runtime", **at_least(0, self, "threads"))

    def cache_for(self, path: str) -> str:
        """The folder of encodings for the prepared TAG at ``path``; empty: they are not kept."""
        return (self.cache_folder or path) if self.cache else ""


@dataclass(frozen=True)
class ClusterConfig:
    """With `runtime.kind: ray`: which cluster, and what of it."""

    address: str = ""
    """`auto` or host:port of a running cluster's head; empty: the one that RAY_ADDRESS names, else a Ray that is
    started here for this run."""
    actors: int = 0
    """Actors that hold shards (0: one a partition)."""
    cpus: float = 0.0
    """Cores reserved for an actor (0: its threads)."""
    gpus: float = -1.0
    """GPUs reserved for an actor; a fraction shares one (-1: one, if the cluster has any)."""
    memory_gib: float = 0.0
    """Memory reserved for an actor (0: what `estimate` says)."""
    wait_seconds: float = 300.0
    """How long to wait for these resources, at the start and when a node is lost."""
    attempts: int = 4
    """An actor that dies so many times in the same call is given up; one that dies elsewhere is replaced."""

    def __post_init__(self) -> None:
        check_types("cluster", self)
        check(
            "cluster",
            gpus=(self.gpus >= 0 or self.gpus == -1, self.gpus, "not negative, or -1"),
            **at_least(0, self, "actors", "cpus", "memory_gib"),
            **at_least(1, self, "attempts"),
            **positive(self, "wait_seconds"),
        )


@dataclass(frozen=True)
class DeepSpeedConfig:
    """With `runtime.kind: ray`: the language model on workers of its own, under DeepSpeed's ZeRO."""

    workers: int = 0
    """Workers that share the synthetic nodes (0: the driver holds the language model itself)."""
    stage: Literal[0, 1, 2, 3] = 1
    """What is split over the workers: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    offload: bool = False
    """Keep optimizer states (and, at stage 3, parameters) in host memory."""
    encode_texts: bool = False
    """Encode the real texts on these workers too: for a model that does not fit one device (stage 3)."""
    cpus: float = 1.0
    """Cores reserved for a worker."""
    gpus: float = 0.0
    """GPUs reserved for a worker, whole ones."""

    def __post_init__(self) -> None:
        check_types("deepspeed", self)
        check(
            "deepspeed",
            **at_least(0, self, "workers", "cpus"),
            gpus=(self.gpus >= 0 and float(self.gpus).is_integer(), self.gpus, "a whole number"),
            encode_texts=(not self.encode_texts or self.workers > 0, self.encode_texts, "needs deepspeed.workers"),
        )
