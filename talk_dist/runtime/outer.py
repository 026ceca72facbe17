"""The outer objective as a function of the synthetic encodings: broadcast, sum over shards, complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from talk_dist.config import DistillConfig
from talk_dist.kernel.krr import DualSolution, complete_gradient, dual_coefficients, loss_scale
from talk_dist.kernel.sntk import KernelBlock, symmetric, synthetic_block
from talk_dist.models.gnn import Student
from talk_dist.runtime.boundary import LossSpec, StudentState
from talk_dist.runtime.pool import ShardPool


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
        outer = self.config.outer
        h_s, meter, blocks = h_s.cpu(), self.pool.meter, self.config.kernel.blocks(len(h_s))
        with meter.time("solve"):
            solutions = self._solve(h_s, y_s)
        folds = self.folds(len(h_s))
        loss = LossSpec(outer.loss, log_temperature, outer.targets, step % folds, folds)
        sums = self.pool.loss_and_grads(
            h_s.numpy(), interleaved([solution.dual for _, solution in solutions]).numpy(), loss
        )
        scale = loss_scale(outer.loss, sums.num_rows, y_s.shape[1])
        d_dual, d_hs = scale * torch.from_numpy(sums.d_dual), scale * torch.from_numpy(sums.d_hs)
        with meter.time("solve"):
            gradients = [
                complete_gradient(h_s[i::blocks], block, solution, d_dual[i::blocks], d_hs[i::blocks])
                for i, (block, solution) in enumerate(solutions)
            ]
        all_hs, all_ys = (interleaved(list(each)) for each in zip(*gradients, strict=True))
        return OuterGradient(scale * sums.loss, all_hs, all_ys, scale * sums.d_log_temperature)

    def folds(self, num_synthetic: int) -> int:
        """Steps in which every real row has its turn."""
        outer, meta = self.config.outer, self.pool.tag.meta
        rows = meta["num_nodes"] if outer.targets == "teacher" else meta["split_sizes"]["train"]
        a_step = outer.rows * self.config.kernel.blocks(num_synthetic)
        return max(1, round(rows / a_step)) if outer.rows else 1

    def krr_counts(self, h_s: Tensor, y_s: Tensor, split: str) -> np.ndarray:
        """Confusion counts (C, C) of the kernel predictor on ``split``."""
        h_s = h_s.cpu()
        dual = interleaved([solution.dual for _, solution in self._solve(h_s, y_s)])
        return self.pool.krr_scores(h_s.numpy(), dual.numpy(), split)

    def _solve(self, h_s: Tensor, y_s: Tensor) -> list[tuple[KernelBlock, DualSolution]]:
        """Of each block (`KernelConfig.blocks`)."""
        kernel, blocks = self.config.kernel, self.config.kernel.blocks(len(h_s))
        found = []
        for i in range(blocks):
            block = synthetic_block(h_s[i::blocks].double(), kernel.rounds, kernel.layers)
            found.append((block, dual_coefficients(symmetric(block.dense()), y_s[i::blocks], kernel.ridge)))
        return found


def interleaved(blocks: Sequence[Tensor]) -> Tensor:
    """Rows of B blocks as those of one matrix (M, ...): row r of block i becomes row r B + i."""
    whole = blocks[0].new_empty((sum(map(len, blocks)), *blocks[0].shape[1:]))
    for i, block in enumerate(blocks):
        whole[i :: len(blocks)] = block
    return whole


def accuracy(counts: np.ndarray) -> float:
    """Share of hits in confusion counts (C, C) [true, predicted]."""
    return float(np.trace(counts) / max(1, counts.sum()))


def macro_f1(counts: np.ndarray) -> float:
    """Mean over classes of the F1 score, from confusion counts (C, C) [true, predicted]."""
    hits = np.diag(counts).astype(np.float64)
    denominator = counts.sum(0) + counts.sum(1)
    present = denominator > 0
    return float((2 * hits[present] / denominator[present]).mean()) if present.any() else 0.0


def student_accuracy(pool: ShardPool, student: Student, split: str) -> float:
    """Accuracy of a trained student on the real nodes of ``split``."""
    return accuracy(pool.student_scores(StudentState.of(student), [split])[0])
