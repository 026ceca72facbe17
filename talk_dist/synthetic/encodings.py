"""Stage one: the M encodings themselves, which needs no encoder pass.

First against the kernel ridge regression loss, which knows students only as infinitely wide; then through students as
they are trained: each step trains one from a fresh start on the encodings and follows the loss of the real rows back
through its training. What is kept validates best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talk_dist.config import DistillConfig
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings, smoothed
from talk_dist.models.protocol import Report
from talk_dist.models.unrolled import Unrolled
from talk_dist.runtime.boundary import LossSpec, StudentState
from talk_dist.runtime.checkpoint import Starting, moments, restore_moments
from talk_dist.runtime.outer import Objective, accuracy, student_accuracy
from talk_dist.runtime.pool import ShardPool


@dataclass(frozen=True)
class Optimised:
    """Encodings (M, d), the log temperature of the loss, and a record of every validation on the way: stage (`kernel`
    or `students`), step, val_accuracy, krr_val_accuracy."""

    h_s: Tensor
    log_temperature: float
    history: list[dict[str, Any]]


def optimise_encodings(
    pool: ShardPool,
    start: Tensor,
    y_s: Tensor,
    config: DistillConfig,
    report: Report,
    starting: Starting | None = None,
) -> Optimised:
    """From ``start`` (M, d) with one-hot labels ``y_s`` (M, C); goes on from what ``starting`` has saved.

    Students learn labels that `synthetic.label_smoothing` softens. Raises ConfigError if their training diverges.
    """
    starting = starting or Starting()
    cut_off = starting.at("students")
    if cut_off:
        found = Optimised(cut_off.tensors["start"], cut_off.facts["log_temperature"], cut_off.facts["history"])
    else:
        found = _against_the_kernel(pool, start, y_s, config, report, starting)
    return _through_students(pool, found, y_s, config, report, starting) if config.two_stage.student_steps else found


def _against_the_kernel(
    pool: ShardPool, start: Tensor, y_s: Tensor, config: DistillConfig, report: Report, starting: Starting
) -> Optimised:
    settings, objective, saved = config.two_stage, Objective(pool, config), starting.at("kernel")
    h_s = start.clone().requires_grad_()
    log_temperature = torch.tensor(Objective.initial_log_temperature, dtype=torch.float64, requires_grad=True)
    scale = float(start.pow(2).mean().sqrt())
    optimizer = torch.optim.Adam(
        [
            {"params": [h_s], "lr": settings.feature_lr * scale},
            {"params": [log_temperature], "lr": config.outer.temperature_lr},
        ]
    )
    history: list[dict[str, Any]] = saved.facts["history"] if saved else []
    first, best, best_accuracy, krr_accuracy = 0, Optimised(start, log_temperature.item(), history), -1.0, 0.0
    if saved:
        first, best_accuracy = saved.facts["step"], saved.facts["best_accuracy"]
        best = Optimised(saved.tensors["best"], saved.facts["best_log_temperature"], history)
        with torch.no_grad():
            h_s.copy_(saved.tensors["h_s"])
            log_temperature.copy_(saved.tensors["log_temperature"])
        restore_moments(optimizer, saved.tensors)
    total = settings.feature_steps + settings.student_steps * config.kernel.blocks(len(start))
    for step in range(first, settings.feature_steps + 1):
        if step % settings.validate_every == 0 or step == settings.feature_steps:
            tensors = {"h_s": h_s, "log_temperature": log_temperature, "best": best.h_s} | moments(optimizer)
            facts = {"best_accuracy": best_accuracy, "best_log_temperature": best.log_temperature}
            starting.save("kernel", tensors, step=step, history=history, **facts)
            krr_accuracy = accuracy(objective.krr_counts(h_s.detach(), y_s, "val"))
            val_accuracy = judged(pool, h_s.detach(), y_s, config, 1, report)
            history.append(_record("kernel", step, val_accuracy, krr_accuracy))
            if val_accuracy > best_accuracy:
                best = Optimised(h_s.detach().clone(), log_temperature.item(), history)
                best_accuracy = val_accuracy
        gradient = objective(h_s.detach(), y_s, log_temperature.item(), step)
        facts = {"loss": gradient.loss, "val": best_accuracy, "krr_val": krr_accuracy}
        report("encodings", step, total, facts)
        h_s.grad = gradient.d_hs.to(h_s)
        log_temperature.grad = torch.tensor(gradient.d_log_temperature, dtype=torch.float64)
        optimizer.step()
    return best


def _through_students(
    pool: ShardPool, found: Optimised, y_s: Tensor, config: DistillConfig, report: Report, starting: Starting
) -> Optimised:
    """Nothing is kept that does not validate half a standard error better than what was ``found``, and the first
    validation that is no better than its own is the last. Blocks take turns: each has `two_stage.student_steps` steps,
    and moments of its own."""
    settings, objective, num_val = config.two_stage, Objective(pool, config), pool.tag.meta["split_sizes"]["val"]
    start, history, saved = found.h_s, found.history, starting.at("students")
    blocks, size = config.kernel.blocks(len(start)), float(start.pow(2).mean().sqrt())
    steps, every = settings.student_steps * blocks, settings.validate_every * blocks
    h_s = saved.tensors["h_s"] if saved else start.clone()
    nodes = [h_s[block::blocks].clone().requires_grad_() for block in range(blocks)]
    optimizer = torch.optim.Adam(nodes, lr=settings.feature_lr * size)
    if saved:
        best, facts = saved.tensors["best"], saved.facts["told"]
        begun, first, needed = (saved.facts[name] for name in ("step", "first", "needed"))
        restore_moments(optimizer, saved.tensors)
    else:
        best, begun, first = start.clone(), 0, judged(pool, start, y_s, config, settings.judges, report)
        needed = first + 0.5 * math.sqrt(first * (1 - first) / num_val)
        facts = {"val": first, "krr_val": accuracy(objective.krr_counts(start, y_s, "val"))}
        history.append(_record("students", 0, first, facts["krr_val"]))
    for step in range(begun, steps):
        if step % every == 0:
            tensors = {"start": start, "h_s": h_s, "best": best} | moments(optimizer)
            where = {"step": step, "first": first, "needed": needed, "told": facts}
            starting.save("students", tensors, log_temperature=found.log_temperature, history=history, **where)
        block = step % blocks
        facts["loss"], nodes[block].grad = student_gradient(pool, h_s, y_s, config, step)
        optimizer.step()
        nodes[block].grad = None  # the others stay where they are until it is their turn
        h_s[block::blocks] = nodes[block].detach()
        over = step + 1 == steps
        if over or (step + 1) % every == 0:
            facts["krr_val"] = accuracy(objective.krr_counts(h_s, y_s, "val"))
            val_accuracy = judged(pool, h_s, y_s, config, settings.judges, report)
            history.append(_record("students", step + 1, val_accuracy, facts["krr_val"]))
            if val_accuracy > needed:
                best, needed, facts["val"] = h_s.clone(), val_accuracy, val_accuracy
            over = over or val_accuracy <= first
        done = settings.feature_steps + (steps if over else step + 1)
        report("encodings", done, settings.feature_steps + steps, facts)
        if over:
            break
    return replace(found, h_s=best)


def _record(stage: str, step: int, val_accuracy: float, krr_val_accuracy: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "val_accuracy": val_accuracy, "krr_val_accuracy": krr_val_accuracy}


def student_gradient(
    pool: ShardPool, h_s: Tensor, y_s: Tensor, config: DistillConfig, step: int
) -> tuple[float, Tensor]:
    """Mean cross-entropy, over the real rows whose turn it is, of a student trained on the block of nodes whose turn it
    is, of ``h_s`` (M, d) with softened ``y_s`` (M, C); and its gradient with respect to these nodes.

    The student starts afresh in each step, and stops after half to all of `two_stage.student_passes`: what serves every
    start and every age serves one that nobody has seen.
    """
    settings, seed = config.two_stage, config.seed + 1_000_003 * (step + 1)
    blocks, folds = config.kernel.blocks(len(h_s)), Objective(pool, config).folds(len(h_s))
    passes = int(np.random.default_rng(seed).integers(-(-settings.student_passes // 2), settings.student_passes + 1))
    own = slice(step % blocks, None, blocks)
    student = Student(config.student, h_s.shape[1], y_s.shape[1], seed)
    with pool.meter.time("unroll"):
        labels = smoothed(y_s[own], config.synthetic.label_smoothing)
        trained = Unrolled(student, h_s[own], labels, config.inner, passes, seed)
    loss = LossSpec("ce", 0.0, config.outer.targets, (step // blocks % folds, folds), (step % blocks, blocks))
    sums = pool.student_grads(StudentState.of(student, trained.weights), loss)
    with pool.meter.time("unroll"):
        rows = max(1, sums.num_rows)  # a block of a small graph may have none in this fold
        d_weights = {name: torch.from_numpy(value / rows) for name, value in sums.d_weights.items()}
        return sums.loss / rows, trained.pull(d_weights)


def judged(pool: ShardPool, h_s: Tensor, y_s: Tensor, config: DistillConfig, judges: int, report: Report) -> float:
    """Mean validation accuracy of so many fresh students."""
    found, labels = [], smoothed(y_s, config.synthetic.label_smoothing)
    for seed in range(config.seed, config.seed + judges):
        student = Student(config.student, h_s.shape[1], y_s.shape[1], seed)
        fit_encodings(student, h_s, labels, config.inner, seed=seed)
        found.append(student_accuracy(pool, student, "val", report))
    return float(np.mean(found))
