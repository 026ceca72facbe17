"""The pool of shards over Ray actors: `LocalPool`'s answers to the bit, whatever dies on the way.

What crosses the driver has M rows or fewer, or is a count: encodings and halo rows go from actor to actor. A shard
is rebuilt from storage, so an actor that is lost is replaced, brought to the current encoding, and asked again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch

from cluster.crew import Crew, Failures, Start
from cluster.encoder_group import EncoderGroup
from cluster.failure import Event
from cluster.placement import Allotment
from talk_dist.config import EncoderConfig, KernelConfig
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag, TokenLists
from talk_dist.errors import ShardError
from talk_dist.models.protocol import Adapters, Progress
from talk_dist.resources import ClusterConfig, RuntimeConfig
from talk_dist.runtime.boundary import LossSpec, ShardGrads, ShardSpec, Share, StudentGrads, StudentState
from talk_dist.runtime.encodings import EncodingCache
from talk_dist.runtime.memory import gib
from talk_dist.runtime.meter import Meter
from talk_dist.runtime.pool import (
    TrainSample,
    Vitals,
    add,
    add_grads,
    add_student_grads,
    join_tokens,
    merge_samples,
    peak_gpu_memory,
    peak_memory,
)
from talk_dist.runtime.shard import field_names, halo_depth


class RayPool:
    """A shard pool whose shards live in actors. Raises ShardError, CapacityError, and what the shards raise."""

    def __init__(
        self,
        tag: PreparedTag,
        encoder: EncoderConfig,
        kernel: KernelConfig,
        runtime: RuntimeConfig,
        cluster: ClusterConfig,
        allotment: Allotment,
        group: EncoderGroup | None = None,
    ):
        """``group``: the language model's workers. If they encode the real texts, the actors hold no model."""
        torch.set_num_threads(allotment.threads)  # the driver's bits depend on it too
        self.tag, self.meter = tag, Meter()
        self._group, self._lends = group, group if group and group.settings.encode_texts else None
        self._encoder = (
            self._lends.lender if self._lends else dataclasses.replace(encoder, name=everywhere(encoder.name))
        )
        path = everywhere(tag.path)
        cache, scratch = storage.absolute(runtime.cache_for(path)), storage.absolute(runtime.scratch)
        self._specs = [ShardSpec(path, part, kernel, cache, scratch) for part in range(tag.num_parts)]
        self._level = dict.fromkeys(range(tag.num_parts), 0)  # part -> phases of `_bring_up` behind it
        self._kernel = kernel
        self._version: str | None = None
        self._adapters: Any = None
        self._teacher: Any = None
        self._bytes_moved = 0
        self._crew = Crew(allotment, cluster, self._lost, self._explain)

    def close(self) -> None:
        """Give the cluster its resources back."""
        self._crew.close()

    # -- the protocol -------------------------------------------------------------------------------------

    def encode(self, adapters: Adapters, progress: Progress | None = None) -> bool:
        version = EncodingCache.version(adapters)
        if fresh := version != self._version:
            if self._lends:
                self._lends.load_adapters(adapters)
            self._version, self._adapters, self._teacher = version, self._broadcast(adapters), None
            self._level = {part: min(level, 1) for part, level in self._level.items()}
        self._bring_up(Failures(), progress)
        return fresh

    def learn(self, teacher: StudentState) -> None:
        self._teacher = None
        taught = len(self._phases())
        self._teacher = self._broadcast(teacher)
        self._level = {part: min(level, taught) for part, level in self._level.items()}
        self._bring_up(Failures())

    def loss_and_grads(self, h_s: np.ndarray, dual: np.ndarray, loss: LossSpec) -> ShardGrads:
        arguments = self._broadcast(h_s), self._broadcast(dual), loss
        return add_grads(self._ask("loss_and_grads", *arguments, phase="kernel"))

    def krr_scores(self, h_s: np.ndarray, dual: np.ndarray, split: str, block: Share = (0, 1)) -> np.ndarray:
        return add(self._ask("krr_scores", self._broadcast(h_s), self._broadcast(dual), split, block))

    def student_scores(self, student: StudentState, split: str, progress: Progress | None = None) -> np.ndarray:
        state, stages, failures = self._broadcast(student), student.build().num_stages, Failures()
        while True:
            self._bring_up(failures)
            scores = self._student_scores(state, stages, split, failures, progress)
            if scores is not None:
                return scores

    def student_grads(self, student: StudentState, loss: LossSpec) -> StudentGrads:
        return add_student_grads(self._ask("student_grads", self._broadcast(student), loss, phase="students"))

    def sample(self, per_class: int, seed: int, split: str = "train") -> TrainSample:
        return merge_samples(self._ask("sample", per_class, seed, split), per_class)

    def tokens(self, place: np.ndarray) -> TokenLists:
        return join_tokens(place, lambda part, rows: self._ask("tokens", rows, parts=[part])[0])

    def gather(self) -> np.ndarray:
        own = [part["nodes"] for part in self.tag.meta["parts"]]
        return np.concatenate(
            [self._ask("rows", "H", np.arange(count), parts=[part])[0] for part, count in enumerate(own)]
        )

    def vitals(self) -> Vitals:
        host, gpu = {"driver": peak_memory()}, {"driver": peak_gpu_memory()}
        for index, peak in self._crew.look().items():
            name = "shard-" + "+".join(map(str, self._crew.allotment.parts[index]))
            host[name], gpu[name] = peak["host_bytes"], peak["gpu_bytes"]
        for name, peak in self._group.vitals().items() if self._group else ():
            host[name], gpu[name] = peak["host_bytes"], peak["gpu_bytes"]
        return Vitals(self._bytes_moved, self._crew.restarts, host, gpu)

    # -- asking -------------------------------------------------------------------------------------------

    def _ask(self, method: str, *args: Any, parts: Sequence[int] | None = None, phase: str = "ask") -> list[Any]:
        """A method of every shard (or of ``parts``); the replies in shard order."""
        wanted = list(range(self.tag.num_parts)) if parts is None else list(parts)
        failures, replies = Failures(), dict[int, Any]()
        while missing := [part for part in wanted if part not in replies]:
            self._bring_up(failures)
            with self.meter.time(phase):
                replies |= self._crew.each(missing, lambda p: self._actor(p).call.remote(p, method, *args), failures)
        self._bytes_moved += sum(map(_size, replies.values()))
        return [replies[part] for part in wanted]

    def _bring_up(self, failures: Failures, progress: Progress | None = None) -> None:
        """Bring every shard from where it is to the current encoding, the hindmost first: a phase of one shard
        needs its peers' results of the phases before."""
        while (level := min(self._level.values())) < len(phases := self._phases()):
            name, start = phases[level]
            behind = [part for part, reached in self._level.items() if reached == level]
            if name == "encode" and self._lends:
                behind = behind[:1]  # the workers go through their passes together: one shard after another
            with self.meter.time(name):
                replies = self._crew.each(behind, start, failures, progress if name == "encode" else None)
            for part in replies:
                self._level[part] += 1
            if name == "exchange":
                self._bytes_moved += sum(replies.values())

    def _phases(self) -> list[tuple[str, Start]]:
        """What makes an empty actor's shard ready, with the actors as they are now."""
        threads = self._crew.allotment.threads
        phases: list[tuple[str, Start]] = [
            ("load", lambda part: self._actor(part).load.remote(self._specs[part], self._encoder, threads)),
            ("encode", lambda part: self._actor(part).encode.remote(part, self._adapters, self._workers())),
            *(step for hop in pairwise(field_names(self._kernel)) for step in self._hop(*hop)),
            ("exchange", self._exchange("Z", halo_depth(self._kernel))),
            ("propagate", lambda part: self._actor(part).call.remote(part, "measure_norms")),
        ]
        if self._teacher is not None:
            phases.append(("learn", lambda part: self._actor(part).call.remote(part, "learn", self._teacher)))
        return phases

    def _hop(self, source: str, target: str) -> list[tuple[str, Start]]:
        """Fields stay where they are: whoever is brought up later finds the halo of each hop."""
        return [
            ("exchange", self._exchange(source, 1)),
            ("propagate", lambda part: self._actor(part).call.remote(part, "propagate", source, target)),
        ]

    def _student_scores(
        self, state: Any, stages: int, split: str, failures: Failures, progress: Progress | None
    ) -> np.ndarray | None:
        """One pass of the student over all shards; None if one was lost, because its layers cannot be caught up."""

        def every(start: Start) -> dict[int, Any] | None:
            replies = self._crew.each(list(self._level), start, failures)
            return replies if len(replies) == len(self._level) else None

        def call(method: str, *args: Any) -> dict[int, Any] | None:
            return every(lambda part: self._actor(part).call.remote(part, method, *args))

        if call("student_begin", state) is None:
            return None
        for stage in range(stages):
            if progress:
                progress(stage, stages)
            if stage:
                with self.meter.time("exchange"):
                    moved = every(self._exchange("X", 1))
                if moved is None:
                    return None
                self._bytes_moved += sum(moved.values())
            if call("student_stage", stage) is None:
                return None
        counts = call("student_scores", split)
        return None if counts is None else add([counts[part] for part in sorted(counts)])

    def _workers(self) -> list[Any]:
        return self._lends.workers if self._lends else []

    def _exchange(self, name: str, depth: int) -> Start:
        peers = {part: self._actor(part) for part in self._level}
        return lambda part: peers[part].exchange.remote(part, name, depth, peers)

    # -- small things -------------------------------------------------------------------------------------

    def _lost(self, parts: Sequence[int]) -> None:
        self._level |= dict.fromkeys(parts, 0)
        if self._lends:
            self._lends.restart()

    def _explain(self, part: int, event: Event, error: Exception, times: int) -> Exception:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
        if event is Event.OWN_ERROR:
            return cause if isinstance(cause, Exception) else error
        index, shape = self._crew.home[part], self.tag.meta["parts"][part]
        held = self._crew.allotment.parts[index]
        who = f"shard {part} of {self.tag.path} ({shape['nodes']:,} nodes, {shape['halo']:,} halo rows)"
        with_others = f", in an actor with shards {list(held)}" if len(held) > 1 else ""
        peak = self._crew.vitals.get(index, {}).get("host_bytes")
        known = f"estimate: {gib(self._crew.allotment.memory)}" + (f", last seen with {gib(peak)}" if peak else "")
        if event is Event.OUT_OF_MEMORY:
            reason = f"ran out of memory: {known}; {str(cause or error).splitlines()[0]}"
            remedy = "prepare the graph in more --parts, use fewer actors a node, or lower --kernel.chunk_mib"
        elif event is Event.UNPLACEABLE:
            reason, remedy = str(error).splitlines()[0], "add nodes, or lower what cluster.* asks for"
        else:
            reason = f"was lost {times} times in one call ({known}); the last time: {_exit(error)}"
            remedy = "if memory is short on its node, prepare the graph in more --parts; see the actor's log"
        return ShardError(f"{who}{with_others} {reason}. To go on, {remedy}")

    def _actor(self, part: int) -> Any:
        return self._crew.of(part)

    def _broadcast(self, value: Any) -> Any:
        """Once into the object store, whoever reads it."""
        self._bytes_moved += _size(value) * len(self._crew.actors)
        return ray.put(value)


def _size(value: Any) -> int:
    """Bytes of the arrays in what crosses the driver."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if dataclasses.is_dataclass(value):
        return sum(_size(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def everywhere(path: str) -> str:
    """A local path as other processes find it; names and URIs as they are."""
    local = os.path.expanduser(path)
    return os.path.abspath(local) if "://" not in path and os.path.exists(local) else path


def _exit(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "exit detail" in line or "dead because" in line]
    return (lines or str(error).splitlines() or [type(error).__name__])[0][:300]
