"""What crosses the boundary between the method and the shards: plain arrays with M rows or fewer, and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from talk_dist.config import KernelConfig, StudentConfig
from talk_dist.models.gnn import Student


@dataclass(frozen=True)
class ShardSpec:
    """All that is needed to build a shard anywhere."""

    path: str
    part: int
    kernel: KernelConfig
    cache: str = ""  # folder of the encodings that are kept
    scratch: str = ""  # folder of fields on disk


Share = tuple[int, int]  # which one, of how many


@dataclass(frozen=True)
class LossSpec:
    """Which loss, its current log temperature, and what the scores are compared with: "labels" of the training rows,
    or these and what the "teacher" says of every other row; of these rows a share at random, of which another."""

    kind: str
    log_temperature: float = 0.0
    targets: str = "labels"
    fold: Share = (0, 1)  # of the block's rows
    block: Share = (0, 1)

    @property
    def split(self) -> str:
        """Whose rows they are."""
        return "train" if self.targets == "labels" else "all"


@dataclass(frozen=True)
class ShardGrads:
    """Sums over training rows (method, section 4, step 2); ``d_hs`` is the VJP of K at dL/dF B^T."""

    loss: float
    num_rows: int
    d_dual: np.ndarray  # (M, C) K^T dL/dF
    d_hs: np.ndarray  # (M, d)
    d_log_temperature: float


@dataclass(frozen=True)
class StudentGrads:
    """Sums over real rows of a student's cross-entropy, and of its gradient with respect to the weights, by name."""

    loss: float
    num_rows: int
    d_weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class StudentState:
    """A trained student as plain arrays, to be shipped to shards."""

    config: StudentConfig
    in_dim: int
    num_classes: int
    weights: dict[str, np.ndarray]

    @staticmethod
    def of(student: Student, weights: Mapping[str, Tensor] | None = None) -> StudentState:
        """A student, or one like it with these ``weights``."""
        named = student.state_dict() if weights is None else weights
        arrays = {name: value.detach().cpu().numpy() for name, value in named.items()}
        return StudentState(student.config, student.in_dim, student.num_classes, arrays)

    def build(self) -> Student:
        student = Student(self.config, self.in_dim, self.num_classes, seed=0)
        student.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in self.weights.items()})
        return student.eval()


@dataclass(frozen=True)
class Sample:
    """Rows of one shard chosen by the hash of their id, so that the choice does not depend on the sharding."""

    key: np.ndarray  # (s,) uint64
    label: np.ndarray  # (s,) int32
    row: np.ndarray  # (s,) rows in the shard
    features: np.ndarray  # (s, d) P^2 H
