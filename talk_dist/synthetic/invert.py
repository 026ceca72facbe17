"""Inversion: the token embeddings whose encodings are given, one least-squares problem for each synthetic node.

The problems are small, smooth and have many exact solutions, so limited-memory BFGS (Nocedal & Wright 2006, algorithm
7.4) reaches in 80 encoder passes an error that Adam does not in 240 (benchmarks/results/inversion.md). They are solved
side by side, each with a history, a step length and an end of its own: what a node becomes does not depend on the
others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from talk_dist.runtime.chunks import HISTORY

Residual = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""x (m, D) of the nodes (m,) -> squared distances (m,), their gradients (m, D)."""
_TINY = 1e-30


def invert(residual: Residual, x: Tensor, steps: int, goal: Tensor, tell: Callable[[int, Tensor], None]) -> Tensor:
    """Minimise ``residual`` from ``x`` (M, D): at most ``steps`` iterations of one evaluation each, and none of a node
    whose squared distance is at most its ``goal`` (M,), which is never so if that is negative. Each iteration is told
    to ``tell(step, distances)``. No node ends farther than it began."""
    found, nodes = x.clone(), torch.arange(len(x))
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=HISTORY)
    loss, gradient = residual(x, nodes)
    distances, length = loss.clone(), torch.ones_like(loss)
    for step in range(steps):
        far = loss > goal[nodes]
        if not bool(far.any()):
            tell(steps, distances)
            break
        if not bool(far.all()):
            nodes, x, loss, gradient, length = (of_all[far] for of_all in (nodes, x, loss, gradient, length))
            pairs = deque(((move[far], change[far], inverse[far]) for move, change, inverse in pairs), maxlen=HISTORY)
        move = -length[:, None] * _direction(loss, gradient, pairs)
        new_loss, new_gradient = residual(x + move, nodes)
        change = new_gradient - gradient
        curvature = (move * change).sum(1)
        known = curvature > 1e-10 * move.norm(dim=1) * change.norm(dim=1)
        pairs.append((move, change, torch.where(known, 1.0 / curvature.clamp_min(_TINY), 0.0)))
        better = new_loss < loss
        x = torch.where(better[:, None], x + move, x)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        loss = torch.where(better, new_loss, loss)
        length = torch.where(better, (2.0 * length).clamp_max(1.0), 0.3 * length)
        found[nodes], distances[nodes] = x, loss
        tell(step + 1, distances.clone())
    return found


def _direction(loss: Tensor, gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian that ``pairs`` imply, times the gradient (m, D); where they imply no descent, or there are
    none yet, the gradient times Polyak's step length, which is right where the least distance is zero."""
    polyak = loss / gradient.square().sum(1).clamp_min(_TINY)
    q, shares, scale = gradient, [], polyak
    for move, change, inverse in reversed(pairs):
        shares.append(inverse * (move * q).sum(1))
        q = q - shares[-1][:, None] * change
    if pairs:
        move, change, inverse = pairs[-1]
        newton = (move * change).sum(1) / change.square().sum(1).clamp_min(_TINY)
        scale = torch.where(inverse > 0, newton, polyak)
    q = scale[:, None] * q
    for (move, change, inverse), share in zip(pairs, reversed(shares), strict=True):
        q = q + move * (share - inverse * (change * q).sum(1))[:, None]
    descent = (q * gradient).sum(1) > 0
    return torch.where(descent[:, None], q, polyak[:, None] * gradient)
