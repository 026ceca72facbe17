"""The pool of shards: the only thing that `distill` knows of the real graph.

`LocalPool` maps over shards in a loop. Another pool may map over processes: all that crosses its boundary
has M rows or fewer, is a bounded sample, or is a count, and everything is summed in shard order.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from talk_dist.config import KernelConfig
from talk_dist.data.tag import PreparedTag, TokenLists
from talk_dist.models.protocol import Adapters, Encoder, Progress
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.boundary import LossSpec, Sample, ShardGrads, ShardSpec, Share, StudentGrads, StudentState
from talk_dist.runtime.meter import Meter
from talk_dist.runtime.shard import Shard, field_names, halo_depth

SAMPLE_PER_NODE = 512  # sampled training rows of a class per synthetic node: bounds the driver's memory
SAMPLE_MINIMUM = 4096  # of a class
SAMPLE_LIMIT = 1 << 20  # of all classes together, unless that is less than the minimum


@dataclass(frozen=True)
class TrainSample:
    """At most s training rows a class, by class and then by the hash of their id: the same for any sharding."""

    label: np.ndarray  # (n,)
    features: np.ndarray  # (n, d) P^2 H
    place: np.ndarray  # (n, 2) shard, row: for `ShardPool.tokens`


@dataclass(frozen=True)
class Vitals:
    """How the processes of a pool fare, since it was made."""

    bytes_moved: int  # between processes
    restarts: int
    host_bytes: dict[str, int]  # process -> peak of its resident memory
    gpu_bytes: dict[str, int]  # process -> peak of what torch allocated


class ShardPool(Protocol):
    """What the method needs of the real graph, wherever its shards live."""

    tag: PreparedTag
    meter: Meter

    def encode(self, adapters: Adapters, progress: Progress | None = None) -> bool:
        """Encode all texts, exchange halos, propagate; False and nothing to do if these adapters are current."""

    def learn(self, teacher: StudentState) -> None:
        """Targets of all but training rows are what this teacher says of them, until the next encoding."""

    def loss_and_grads(self, h_s: np.ndarray, dual: np.ndarray, loss: LossSpec) -> ShardGrads:
        """Loss and gradient sums over all training rows."""

    def krr_scores(self, h_s: np.ndarray, dual: np.ndarray, split: str, block: Share = (0, 1)) -> np.ndarray:
        """Confusion counts (C, C) of the kernel predictor; (R, C, C) for a stack of R dual coefficients."""

    def student_scores(self, student: StudentState, split: str, progress: Progress | None = None) -> np.ndarray:
        """Confusion counts (C, C) of a student on the real nodes of ``split``; ``progress`` before each stage."""

    def student_grads(self, student: StudentState, loss: LossSpec) -> StudentGrads:
        """Loss and gradient sums of a student over the real rows that ``loss`` names, each by itself."""

    def sample(self, per_class: int, seed: int, split: str = "train") -> TrainSample:
        """Labelled rows of ``split`` with propagated encodings, for initialisation, coresets and teachers."""

    def tokens(self, place: np.ndarray) -> TokenLists:
        """Token ids of the nodes at (shard, row)."""

    def gather(self) -> np.ndarray:
        """All encodings (N, d), by shard. For the full-data reference alone: this one does grow with N."""

    def vitals(self) -> Vitals:
        """Memory, traffic and restarts so far."""


class LocalPool:
    """All shards in this process, sharing one encoder."""

    def __init__(self, tag: PreparedTag, encoder: Encoder, kernel: KernelConfig, runtime: RuntimeConfig):
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        self.tag = tag
        self.shards = [
            Shard(ShardSpec(tag.path, part, kernel, runtime.cache_for(tag.path), runtime.scratch), encoder)
            for part in range(tag.num_parts)
        ]
        self.meter = Meter()
        self._kernel = kernel
        self._exchanged = False

    def encode(self, adapters: Adapters, progress: Progress | None = None) -> bool:
        with self.meter.time("encode"):
            changed = [shard.encode(adapters, progress) for shard in self.shards]
        if self._exchanged and not any(changed):
            return False
        self._exchanged = False  # until the end: an interrupt in between must not leave new H beside old Z
        for source, target in pairwise(field_names(self._kernel)):
            self._exchange(source, 1)
            with self.meter.time("propagate"):
                for shard in self.shards:
                    shard.propagate(source, target)
        self._exchange("Z", halo_depth(self._kernel))
        with self.meter.time("propagate"):
            for shard in self.shards:
                shard.measure_norms()
        self._exchanged = True
        return True

    def learn(self, teacher: StudentState) -> None:
        with self.meter.time("learn"):
            for shard in self.shards:
                shard.learn(teacher)

    def loss_and_grads(self, h_s: np.ndarray, dual: np.ndarray, loss: LossSpec) -> ShardGrads:
        with self.meter.time("kernel"):
            return add_grads([shard.loss_and_grads(h_s, dual, loss) for shard in self.shards])

    def krr_scores(self, h_s: np.ndarray, dual: np.ndarray, split: str, block: Share = (0, 1)) -> np.ndarray:
        return add([shard.krr_scores(h_s, dual, split, block) for shard in self.shards])

    def student_scores(self, student: StudentState, split: str, progress: Progress | None = None) -> np.ndarray:
        for shard in self.shards:
            shard.student_begin(student)
        stages = student.build().num_stages
        for stage in range(stages):
            if progress:
                progress(stage, stages)
            if stage:
                self._exchange("X", 1)
            for shard in self.shards:
                shard.student_stage(stage)
        return add([shard.student_scores(split) for shard in self.shards])

    def student_grads(self, student: StudentState, loss: LossSpec) -> StudentGrads:
        with self.meter.time("students"):
            return add_student_grads([shard.student_grads(student, loss) for shard in self.shards])

    def sample(self, per_class: int, seed: int, split: str = "train") -> TrainSample:
        return merge_samples([shard.sample(per_class, seed, split) for shard in self.shards], per_class)

    def tokens(self, place: np.ndarray) -> TokenLists:
        return join_tokens(place, lambda shard, rows: self.shards[shard].tokens(rows))

    def vitals(self) -> Vitals:
        return Vitals(0, 0, {"driver": peak_memory()}, {"driver": peak_gpu_memory()})

    def gather(self) -> np.ndarray:
        return np.concatenate([shard.rows("H", np.arange(shard.part.num_own)) for shard in self.shards])

    def _exchange(self, name: str, depth: int) -> None:
        with self.meter.time("exchange"):
            for shard in self.shards:
                replies = [self.shards[owner].rows(name, rows) for owner, rows in shard.requests(depth)]
                shard.receive(name, depth, replies)


def sample_size(largest: int, num_classes: int) -> int:
    """Training rows a class from which a set is chosen whose largest class has ``largest`` nodes."""
    return max(SAMPLE_MINIMUM, min(SAMPLE_PER_NODE * largest, SAMPLE_LIMIT // num_classes))


def peak_memory() -> int:
    """Bytes of resident memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_gpu_memory() -> int:
    """Bytes that torch has allocated at most on this process's GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def add(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum in shard order, whatever order the parts arrived in."""
    total = np.array(parts[0])
    for part in parts[1:]:
        total += part
    return total


def add_grads(parts: Sequence[ShardGrads]) -> ShardGrads:
    return ShardGrads(
        loss=sum(p.loss for p in parts),
        num_rows=sum(p.num_rows for p in parts),
        d_dual=add([p.d_dual for p in parts]),
        d_hs=add([p.d_hs for p in parts]),
        d_log_temperature=sum(p.d_log_temperature for p in parts),
    )


def add_student_grads(parts: Sequence[StudentGrads]) -> StudentGrads:
    return StudentGrads(
        loss=sum(p.loss for p in parts),
        num_rows=sum(p.num_rows for p in parts),
        d_weights={name: add([p.d_weights[name] for p in parts]) for name in parts[0].d_weights},
    )


def merge_samples(parts: Sequence[Sample], per_class: int) -> TrainSample:
    key = np.concatenate([p.key for p in parts])
    label = np.concatenate([p.label for p in parts])
    place = np.concatenate([np.stack([np.full(len(p.row), i), p.row], 1) for i, p in enumerate(parts)])
    features = np.concatenate([p.features for p in parts])
    order = np.lexsort((key, label))
    sorted_label = label[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_label, sorted_label)
    order = order[rank < per_class]
    return TrainSample(label[order], features[order], place[order])


def join_tokens(place: np.ndarray, fetch: Callable[[int, np.ndarray], list[np.ndarray]]) -> TokenLists:
    lists: list[np.ndarray] = [np.zeros(0, np.int32)] * len(place)
    for shard in np.unique(place[:, 0]):
        slots = np.flatnonzero(place[:, 0] == shard)
        for slot, tokens in zip(slots, fetch(int(shard), place[slots, 1]), strict=True):
            lists[slot] = tokens
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in lists])]).astype(np.int64)
    return TokenLists(offsets, np.concatenate(lists))
