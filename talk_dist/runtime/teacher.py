"""The teacher: a student of everything, which says of every real row what the kernel predictor is to say.

The labels of the training rows are few and hard; what a trained student says of all rows is neither, and a synthetic
set fitted to it overfits later (knowledge distillation: Hinton et al. 2015). The teacher sees propagated encodings
P^2 H of nodes by themselves, as a student sees synthetic nodes: so it is trained in the driver on a bounded sample of
training rows, and applied by each shard to its own rows without any exchange.
"""

from __future__ import annotations

import dataclasses

import torch

from talk_dist.config import DistillConfig
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings, one_hot
from talk_dist.models.protocol import Encoder, Report
from talk_dist.runtime.boundary import StudentState
from talk_dist.runtime.outer import student_accuracy
from talk_dist.runtime.pool import SAMPLE_MINIMUM, ShardPool


def trained_teacher(pool: ShardPool, config: DistillConfig, report: Report) -> Student:
    """`config.student` trained on a sample of the pool's training rows (all of them on a small graph), the pass chosen
    on validation nodes. The pool must hold current encodings."""
    sample = pool.sample(SAMPLE_MINIMUM, config.seed)
    features, labels = torch.from_numpy(sample.features), one_hot(sample.label, len(pool.tag.classes))
    recipe = dataclasses.replace(config.inner, patience=config.inner.passes)
    looks = 0

    def validated(student: Student) -> float:
        nonlocal looks
        looks += 1
        value = student_accuracy(pool, student, "val")
        report("teacher", min(looks * recipe.select_every, recipe.passes), recipe.passes, {"val": value})
        return value

    student = Student(config.student, features.shape[1], labels.shape[1], config.seed)
    with pool.meter.time("teach"):
        fit_encodings(student, features, labels, recipe, seed=config.seed, select=validated)
    return student


class RealSide:
    """The real graph as the method sees it: encoded and, if `outer.targets` wants one, with a teacher's word on it."""

    def __init__(self, pool: ShardPool, config: DistillConfig):
        self.pool, self.config = pool, config
        self._teacher: Student | None = None  # of the present encodings

    def teacher(self, report: Report) -> Student:
        """Trained when it is asked for first; the pool must hold current encodings."""
        if self._teacher is None:
            self._teacher = trained_teacher(self.pool, self.config, report)
        return self._teacher

    def encode(self, encoder: Encoder, report: Report) -> None:
        """All texts with the encoder's adapters as they are now; nothing to do if that is what the pool holds."""
        fresh = self.pool.encode(encoder.adapters(), lambda done, total: report("encode", done, total, {}))
        if fresh:
            self._teacher = None
        if self.config.outer.targets == "teacher" and self._teacher is None:
            self.pool.learn(StudentState.of(self.teacher(report)))
