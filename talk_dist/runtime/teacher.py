"""The teacher: a student of everything, which says what the kernel predictor is to say of rows that have no label.

The labels of the training rows are few; what a trained student says of all others are many more and softer, and a
synthetic set fitted to both overfits later (self-training: Lee 2013; distillation: Hinton et al. 2015). The teacher
sees propagated encodings P^2 H of nodes by themselves, as a student sees synthetic nodes: so it is trained in the
driver on a bounded sample of training rows, chosen on one of validation rows, and applied by each shard to its own rows
without any exchange.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from talk_dist.config import DistillConfig
from talk_dist.models.gnn import Student
from talk_dist.models.inner import train
from talk_dist.models.protocol import Encoder, Report
from talk_dist.runtime.boundary import StudentState
from talk_dist.runtime.pool import SAMPLE_MINIMUM, ShardPool

BATCH = 4096  # rows of a pass
LONGER = 5  # times as many passes as a student of a small set, at most
PATIENCE = 6  # validations without a better one


def trained_teacher(pool: ShardPool, config: DistillConfig, report: Report) -> Student:
    """`config.student`, trained with its dropout and without (which many rows do better without), the better of them
    and its pass chosen on a sample of validation rows. The pool must hold current encodings."""
    rows, val_rows = (_Rows(pool, split, config.seed) for split in ("train", "val"))
    passes, dropouts = LONGER * config.inner.passes, dict.fromkeys((config.student.dropout, 0.0))
    recipe = dataclasses.replace(config.inner, passes=passes, patience=passes, select_patience=PATIENCE)
    candidates, looks = [], 0

    def step(_: int) -> Tensor:
        features, label = rows.drawn()
        loss = cross_entropy(student(features), label)
        loss.backward()
        return loss.detach()

    def validated(student: Student) -> float:
        nonlocal looks
        looks += 1
        value = val_rows.accuracy(student)
        report("teacher", looks * recipe.select_every, len(dropouts) * passes, {"val": value})
        return value

    with pool.meter.time("teach"):
        for dropout in dropouts:
            kind = dataclasses.replace(config.student, dropout=dropout)
            student = Student(kind, rows.features.shape[1], len(pool.tag.classes), config.seed)
            fit = train(step, student, recipe, seed=config.seed, select=validated)
            candidates.append((fit.selected, student))
    return max(candidates, key=lambda one: one[0])[1]


class _Rows:
    """A sample of a split (all of it on a small graph). It has at most so many rows of a class: they count, and are
    drawn, as often as the rows that they stand for."""

    def __init__(self, pool: ShardPool, split: str, seed: int):
        sample = pool.sample(SAMPLE_MINIMUM, seed, split)
        self.features, self.label = torch.from_numpy(sample.features), torch.from_numpy(sample.label).long()
        counts = torch.tensor(pool.tag.meta["class_counts"][split], dtype=torch.float64)
        self._weight = (counts / torch.bincount(self.label, minlength=len(counts)).clamp_min(1))[self.label]

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Features and labels for one pass: all, or a batch."""
        if len(self.label) <= BATCH:
            return self.features, self.label
        some = torch.multinomial(self._weight, BATCH, replacement=True)
        return self.features[some], self.label[some]

    @torch.no_grad()
    def accuracy(self, student: Student) -> float:
        hits = student(self.features).argmax(1) == self.label
        return float(self._weight[hits].sum() / self._weight.sum())


class RealSide:
    """The real graph as the method sees it: encoded and, where steps want it (`outer.targets`), with a teacher's word
    on it."""

    def __init__(self, pool: ShardPool, config: DistillConfig):
        self.pool, self.config = pool, config
        self._taught = False  # with the present encodings

    def encode(self, encoder: Encoder, report: Report) -> None:
        """All texts with the encoder's adapters as they are now; nothing to do if that is what the pool holds."""
        if self.pool.encode(encoder.adapters(), lambda done, total: report("encode", done, total, {})):
            self._taught = False

    def teach(self, report: Report) -> None:
        """Before the first step on these encodings: what only validates needs no teacher."""
        if self.config.outer.targets == "teacher" and not self._taught:
            self.pool.learn(StudentState.of(trained_teacher(self.pool, self.config, report)))
            self._taught = True
