"""The outer objective as a function of the synthetic encodings: broadcast, sum over shards, complete."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from talk_dist.config import DistillConfig
from talk_dist.kernel.krr import DualSolution, complete_gradient, dual_coefficients, loss_scale
from talk_dist.kernel.sntk import KernelBlock, symmetric, synthetic_block
from talk_dist.models.gnn import Student
from talk_dist.models.protocol import Report
from talk_dist.runtime.boundary import LossSpec, Share, StudentState
from talk_dist.runtime.pool import ShardPool, add


@dataclass(frozen=True)
class OuterGradient:
    """Mean loss over the training rows and its gradient."""

    loss: float
    d_hs: Tensor  # (M, d) float64
    d_ys: Tensor  # (M, C) float64
    d_log_temperature: float


@dataclass(frozen=True)
class Objective:
    """The kernel ridge regression loss of a synthetic set on the real training rows (method, section 3)."""

    initial_log_temperature: ClassVar[float] = math.log(5.0)

    pool: ShardPool
    config: DistillConfig

    def __call__(self, h_s: Tensor, y_s: Tensor, log_temperature: float, step: int = 0) -> OuterGradient:
        """Loss and gradient at encodings ``h_s`` (M, d) and labels ``y_s`` (M, C), over the real rows whose turn it is
        in this ``step``: all of them, unless `outer.rows` says otherwise."""
        outer, meter, h_s = self.config.outer, self.pool.meter, h_s.cpu()
        folds = self.folds(len(h_s))
        loss = LossSpec(outer.loss, log_temperature, outer.targets, (step % folds, folds))
        total, rows, d_log_temperature, d_hs, d_ys = (
            0.0,
            0,
            0.0,
            torch.zeros_like(h_s).double(),
            torch.zeros(y_s.shape).double(),
        )
        for block, own in self._blocks(len(h_s)):
            with meter.time("solve"):
                kernel, solution = self._solve(h_s[own], y_s[own])
            sums = self.pool.loss_and_grads(h_s[own].numpy(), solution.dual.numpy(), replace(loss, block=block))
            with meter.time("solve"):
                d_dual, through_rows = torch.from_numpy(sums.d_dual), torch.from_numpy(sums.d_hs)
                d_hs[own], d_ys[own] = complete_gradient(h_s[own], kernel, solution, d_dual, through_rows)
            total, rows = total + sums.loss, rows + sums.num_rows
            d_log_temperature += sums.d_log_temperature
        scale = loss_scale(outer.loss, rows, y_s.shape[1])
        return OuterGradient(scale * total, scale * d_hs, scale * d_ys, scale * d_log_temperature)

    def folds(self, num_synthetic: int) -> int:
        """Steps in which every real row has its turn."""
        outer, meta = self.config.outer, self.pool.tag.meta
        rows = meta["num_nodes"] if outer.targets == "teacher" else meta["split_sizes"]["train"]
        a_step = outer.rows * self.config.kernel.blocks(num_synthetic)
        return max(1, round(rows / a_step)) if outer.rows else 1

    def krr_counts(self, h_s: Tensor, y_s: Tensor, split: str) -> np.ndarray:
        """Confusion counts (C, C) of the kernel predictor on ``split``, of each row by that of its block."""
        h_s, counts = h_s.cpu(), []
        for block, own in self._blocks(len(h_s)):
            _, solution = self._solve(h_s[own], y_s[own])
            counts.append(self.pool.krr_scores(h_s[own].numpy(), solution.dual.numpy(), split, block))
        return add(counts)

    def _blocks(self, num_synthetic: int) -> Iterator[tuple[Share, slice]]:
        """Which block of how many, and its nodes (`KernelConfig.blocks`)."""
        blocks = self.config.kernel.blocks(num_synthetic)
        return (((i, blocks), slice(i, None, blocks)) for i in range(blocks))

    def _solve(self, h_s: Tensor, y_s: Tensor) -> tuple[KernelBlock, DualSolution]:
        kernel = synthetic_block(h_s.double(), self.config.kernel.rounds, self.config.kernel.layers)
        return kernel, dual_coefficients(symmetric(kernel.dense()), y_s, self.config.kernel.ridge)


def accuracy(counts: np.ndarray) -> float:
    """Share of hits in confusion counts (C, C) [true, predicted]."""
    return float(np.trace(counts) / max(1, counts.sum()))


def macro_f1(counts: np.ndarray) -> float:
    """Mean over classes of the F1 score, from confusion counts (C, C) [true, predicted]."""
    hits = np.diag(counts).astype(np.float64)
    denominator = counts.sum(0) + counts.sum(1)
    present = denominator > 0
    return float((2 * hits[present] / denominator[present]).mean()) if present.any() else 0.0


def student_accuracy(pool: ShardPool, student: Student, split: str, report: Report = lambda *_: None) -> float:
    """Accuracy of a trained student on the real nodes of ``split``."""
    state = StudentState.of(student)
    return accuracy(pool.student_scores(state, split, lambda done, total: report("validate", done, total, {})))
