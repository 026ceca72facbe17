"""The inner loop: train a student, and the encoder's adapters if it has any, on a small set of synthetic nodes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from talk_dist.config import InnerConfig
from talk_dist.errors import ConfigError
from talk_dist.models.gnn import Student, drawing
from talk_dist.models.protocol import Adapters, FitResult, Progress, Select


def diverged(loss: float, index: int) -> ConfigError:
    """The error for a loss that is not finite in pass ``index``."""
    return ConfigError(f"training diverged: the loss is {loss} in pass {index}; lower inner.gnn_lr or adapter_lr")


def soft_labels(y_s: Tensor) -> Tensor:
    """Label matrix (M, C) as class probabilities: negative entries cut, rows summing to one."""
    positive = y_s.clamp_min(0.0)
    return (positive / positive.sum(1, keepdim=True).clamp_min(1e-12)).float()


def smoothed(y_s: Tensor, share: float) -> Tensor:
    """Labels (M, C), ``share`` of them spread over all classes. The kernel predictor's choice does not change: it is
    linear in the labels, and what is added is the same for every class."""
    return (1.0 - share) * y_s + share / y_s.shape[1]


def one_hot(label: np.ndarray, num_classes: int) -> Tensor:
    """Class indices (n,) as (n, C) float32; the rows of unlabelled nodes (-1) are zero."""
    return torch.from_numpy((label[:, None] == np.arange(num_classes)).astype(np.float32))


def cut(given: Tensor | None, rows: slice) -> Tensor | None:
    """These rows of what may not be given."""
    return None if given is None else given[rows]


class Adapted(Protocol):
    """What training needs of an encoder with adapters."""

    def encode_embeds(self, x: Tensor, mask: Tensor | None = None, batch: int = 32) -> Tensor: ...
    def forward_embeds(
        self, x: Tensor, mask: Tensor | None = None, dropout_seed: int | None = None, below: Tensor | None = None
    ) -> Tensor: ...
    def states_below(self, x: Tensor, mask: Tensor | None = None, batch: int = 32) -> Tensor | None: ...
    def adapter_parameters(self) -> dict[str, nn.Parameter]: ...
    def adapters(self) -> Adapters: ...
    def load_adapters(self, adapters: Adapters) -> None: ...


def fit_adapters(
    encoder: Adapted,
    student: Student,
    x_s: Tensor,
    y_s: Tensor,
    config: InnerConfig,
    *,
    mask: Tensor | None = None,
    seed: int = 0,
    batch: int = 32,
    select: Select | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train student and adapters on (x_s, y_s, I). Layers below the adapters run once.

    With ``select`` the student learns first, from what the encoder says as it is: a fresh one would spoil the encoder
    (Kumar et al., ICLR 2022), and what is selected is never worse than without adapters.

    The gradients of all batches are summed before the step, so that the batch size changes memory and not the
    result (but for dropout's draws).
    """
    selected = -math.inf
    if select is not None:
        h_s = encoder.encode_embeds(x_s, mask, batch)
        selected = fit_encodings(student, h_s, y_s, config, seed=seed, select=select, progress=progress).selected
    targets, below = soft_labels(y_s), encoder.states_below(x_s, mask, batch)

    def step(index: int) -> Tensor:
        total = torch.zeros(())
        for start in range(0, len(x_s), batch):
            rows = slice(start, start + batch)
            dropout_seed = seed + index * len(x_s) + start
            h = encoder.forward_embeds(x_s[rows], cut(mask, rows), dropout_seed, cut(below, rows)).cpu()
            loss = cross_entropy(student(h), targets[rows], reduction="sum") / len(x_s)
            loss.backward()
            total += loss.detach()
        return total

    return train(step, student, config, encoder=encoder, seed=seed, select=select, selected=selected, progress=progress)


def fit_encodings(
    student: Student,
    h_s: Tensor,
    y_s: Tensor,
    config: InnerConfig,
    *,
    seed: int = 0,
    select: Select | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train a student on fixed encodings (M, d) of nodes that only see themselves."""
    targets = soft_labels(y_s)

    def step(index: int) -> Tensor:
        loss = cross_entropy(student(h_s), targets)
        loss.backward()
        return loss.detach()

    return train(step, student, config, seed=seed, select=select, progress=progress)


def train(
    step: Callable[[int], Tensor],
    student: Student,
    config: InnerConfig,
    *,
    encoder: Adapted | None = None,
    seed: int,
    select: Select | None = None,
    selected: float = -math.inf,
    progress: Progress | None = None,
) -> FitResult:
    """AdamW on student and adapters over ``step(pass)``, which leaves gradients and returns the loss.

    Without ``select`` the best pass has the lowest training loss; with it, the highest ``select(student)`` (validation
    accuracy), asked every ``config.select_every`` passes, with adapters ``adapter_select_every``, and the end comes
    after ``select_patience`` answers in a row that are no better; ``selected`` is what it says of the start, which
    remains if nothing is better. ``progress(passes done, at most)`` comes before every pass. Shared by the small sets
    above and by the full-data reference, so that one recipe serves both.
    """
    parameters = encoder.adapter_parameters() if encoder else {}
    every = config.adapter_select_every if encoder else config.select_every
    passes = config.joint_passes if encoder else config.passes
    for p in parameters.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": student.parameters(), "lr": config.gnn_lr, "weight_decay": config.weight_decay},
            {"params": parameters.values(), "lr": config.adapter_lr, "weight_decay": 0.0},
        ]
    )
    best, best_value, best_loss, stale, worse, index = None, selected, math.inf, 0, 0, 0
    if selected > -math.inf:
        best = _snapshot(student, encoder)
    with drawing(seed):
        for index in range(1, passes + 1):
            if progress:
                progress(index - 1, passes)
            student.train()
            optimizer.zero_grad()
            loss = float(step(index))
            if not math.isfinite(loss):
                raise diverged(loss, index)
            stale = 0 if loss < best_loss else stale + 1
            best_loss = min(best_loss, loss)
            last = stale >= config.patience or loss < config.target_loss or index == passes
            if select is None and loss <= best_loss:
                best_value, best = -loss, _snapshot(student, encoder)
            optimizer.step()
            if select is not None and (last or index % every == 0):
                student.eval()
                value = select(student)
                worse += 1
                if value > best_value:
                    best_value, best, worse = value, _snapshot(student, encoder), 0
            if last or (config.select_patience and worse >= config.select_patience):
                break
    for p in parameters.values():
        p.requires_grad_(False)
    if best is not None:
        student.load_state_dict(best[0])
        if encoder:
            encoder.load_adapters(best[1])
    student.eval()
    return FitResult(index, best_loss, best_value)


def _snapshot(student: Student, encoder: Adapted | None) -> tuple[dict[str, Tensor], Adapters]:
    return copy.deepcopy(student.state_dict()), encoder.adapters() if encoder else {}
