"""What the processes of a run get of a cluster: how many, on which cores, GPUs and memory, and the wait for it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from talk_dist.errors import CapacityError
from talk_dist.resources import ClusterConfig, RuntimeConfig
from talk_dist.runtime.memory import gib

TOLD_EVERY = 10.0  # seconds between lines about what is missing


@dataclass(frozen=True)
class Allotment:
    """Parts by actor, and what each actor reserves."""

    parts: tuple[tuple[int, ...], ...]
    cpus: float
    gpus: float
    memory: int
    threads: int

    @property
    def bundles(self) -> list[dict[str, float]]:
        one = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory)}
        return [{name: value for name, value in one.items() if value} for _ in self.parts]


def allot(
    num_parts: int,
    nodes: Sequence[dict[str, float]],
    runtime: RuntimeConfig,
    cluster: ClusterConfig,
    memory: Callable[[Sequence[int]], int],
    runs: int = 1,
) -> Allotment:
    """Who gets what, from the settings and the resources of the nodes that are there now, of one of so many ``runs``.

    As many actors as there are parts, GPUs (where there are any) and cores for; each takes an equal share of the
    cores that are not another's, on one node. ``memory`` says what an actor with these parts needs, in bytes.
    """
    gpus = cluster.gpus if cluster.gpus >= 0 else float(any(node.get("GPU", 0) for node in nodes))
    actors = min(cluster.actors or num_parts, num_parts)
    if not cluster.actors and any(node.get("CPU", 0) for node in nodes):  # some start workers when asked
        actors = min(actors, max(1, seats(nodes, cluster.cpus or runtime.threads or 1, gpus) // runs))
    cpus = cluster.cpus or float(runtime.threads or equal_share(nodes, actors * runs, gpus))
    parts = tuple(tuple(range(index, num_parts, actors)) for index in range(actors))
    needed = max(memory(mine) for mine in parts)
    reserved = int(cluster.memory_gib * 2**30) or needed
    return Allotment(parts, cpus, gpus, reserved, runtime.threads or max(1, math.floor(cpus)))


@dataclass(frozen=True)
class Room:
    """Bundles of a placement group, from ``first`` on; ``ours`` if the group was made for them alone."""

    group: PlacementGroup
    first: int = 0
    ours: bool = True

    def strategy(self, index: int) -> PlacementGroupSchedulingStrategy:
        """What puts an actor into a bundle."""
        return PlacementGroupSchedulingStrategy(self.group, self.first + index)

    def release(self) -> None:
        """Give the cluster its resources back; those of a trial, its sweep gives back."""
        if self.ours:
            remove_placement_group(self.group)


def reserve(bundles: Sequence[dict[str, float]], strategy: str, wait_seconds: float, what: str, remedy: str) -> Room:
    """Room for ``bundles``, once it is there. Raises CapacityError, with what is missing, after ``wait_seconds``.

    While it waits, it says what for. A trial of a sweep has its room already.
    """
    trial = get_current_placement_group()
    if trial is not None:
        return _part_of(trial, bundles, what)
    group = placement_group(list(bundles), strategy=strategy)
    started, told = time.monotonic(), -math.inf
    while not group.wait(timeout_seconds=min(2.0, wait_seconds)):
        now = time.monotonic()
        if now - started >= wait_seconds:
            remove_placement_group(group)
            raise CapacityError(f"{shortage(bundles, what)}; waited {wait_seconds:.0f} s. {remedy}")
        if now - told >= TOLD_EVERY:
            told = now
            print(f"{shortage(bundles, what)}; waiting {wait_seconds - (now - started):.0f} s more", file=sys.stderr)
    return Room(group)


def _part_of(group: PlacementGroup, bundles: Sequence[dict[str, float]], what: str) -> Room:
    """Where ``bundles`` lie in the group of a trial, from the end: the trial's own process comes first."""
    there = group.bundle_specs
    for first in range(len(there) - len(bundles), -1, -1):
        if all(_alike(ours, theirs) for ours, theirs in zip(bundles, there[first:], strict=False)):
            return Room(group, first, ours=False)
    raise CapacityError(f"{what} need {list(bundles)}, and what was reserved for this trial is {there}")


def _alike(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    return ours.keys() == theirs.keys() and all(math.isclose(ours[name], theirs[name], rel_tol=1e-3) for name in ours)


def seats(nodes: Sequence[dict[str, float]], cpus: float, gpus: float = 0.0) -> int:
    """How many processes find so many cores and GPUs, each on one node."""
    able = [[node.get("CPU", 0) // cpus] + ([node.get("GPU", 0) // gpus] if gpus else []) for node in nodes]
    return int(sum(max(0, min(each)) for each in able))


def equal_share(nodes: Sequence[dict[str, float]], count: int, gpus: float = 0.0) -> int:
    """The most cores, at least one, that each of ``count`` processes can have on one node."""
    cores = [int(node.get("CPU", 0)) for node in nodes]
    share = max(1, min(sum(cores) // count, max(cores, default=1)))
    while share > 1 and seats(nodes, share, gpus) < count:
        share -= 1
    return share


def hide_others_gpus() -> None:
    """A process that reserved no GPU sees none: Ray leaves all of its node visible, and `auto` would take the first."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def fits(bundles: Sequence[dict[str, float]], nodes: Sequence[dict[str, float]]) -> bool:
    """Whether all ``bundles`` find room on ``nodes`` together, each on one of them.

    Largest first, each where most is left: exact for one node, and where bundles are alike. Of mixed ones on several
    nodes it may miss a way that exists.
    """
    free = [dict(node) for node in nodes]
    names = sorted({name for bundle in bundles for name in bundle}, key=lambda name: (name != "GPU", name))
    for bundle in sorted(bundles, key=lambda bundle: [bundle.get(name, 0.0) for name in names], reverse=True):
        able = [node for node in free if all(node.get(n, 0.0) >= v - 1e-6 for n, v in bundle.items())]
        if not able:
            return False
        best = max(able, key=lambda node: [node.get(name, 0.0) for name in names])
        for name, amount in bundle.items():
            best[name] = best.get(name, 0.0) - amount
    return True


def shortage(bundles: Sequence[dict[str, float]], what: str) -> str:
    """What was asked of the cluster beside what it has."""
    wanted, has, free = _total(bundles), ray.cluster_resources(), ray.available_resources()
    names = [name for name in ("CPU", "GPU", "memory") if wanted.get(name)]
    parts = [
        f"{_amount(name, wanted[name])} (it has {_amount(name, has.get(name, 0))}, "
        f"{_amount(name, free.get(name, 0))} free)"
        for name in names
    ]
    kinds = Counter(" and ".join(_amount(name, bundle[name]) for name in names if name in bundle) for bundle in bundles)
    each = " + ".join(f"{count} × ({kind or 'nothing'})" for kind, count in kinds.items())
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    return f"no room for {what}: {each} ask the cluster of {nodes} node(s) for {', '.join(parts)}"


def _total(bundles: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for bundle in bundles for name in bundle}


def _amount(name: str, value: float) -> str:
    return gib(value) if name == "memory" else f"{value:g} {name}"
