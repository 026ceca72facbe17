"""Settling: token embeddings on a coarse grid (`grid`) whose encodings are those of the embeddings given.

A node has far more numbers than its encoding, so the rounding of some can be made good by the others: a growing share
of them is rounded, and after each round the rest is fitted again by `invert`. What the last ones leave is worked off by
moving single numbers a level up or down. Each node is settled by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from talk_dist.config import BITS, DistillConfig
from talk_dist.models.protocol import Encoder, Report
from talk_dist.runtime.chunks import TOGETHER
from talk_dist.synthetic import grid
from talk_dist.synthetic.invert import invert

KEEP = 0.45  # share of the free numbers that stays free after a round
ROUNDS = 8
WAIT = 8  # passes that a number rests after its move was no good


def settle(encoder: Encoder, x_s: Tensor, config: DistillConfig, report: Report) -> Tensor:
    """``x_s`` (M, T, d_tok) on the grid of `synthetic.storage`, its encodings those of ``x_s`` times `synthetic.gain`.

    Formats of 8 bits and more, and real tokens, need none of this: they get ``x_s`` back. Ends with fresh adapters.
    """
    if not config.settles:
        return x_s
    encoder.reset_adapters(config.seed)
    passes, groups = config.synthetic.settle_passes, x_s.split(TOGETHER)
    found = []
    for group, x in enumerate(groups):

        def tell(step: int, error: float, before: int = group * passes) -> None:
            report("settle", before + step, len(groups) * passes, {"relative_error": error})

        found.append(_settled(encoder, x, config, tell))
    return torch.cat(found)


def _settled(encoder: Encoder, x_s: Tensor, config: DistillConfig, tell: Callable[[int, float], None]) -> Tensor:
    """`settle` of nodes that are held side by side."""
    synthetic, batch, bits = config.synthetic, config.outer.inject_batch, BITS[config.storage]
    target = synthetic.gain * encoder.encode_embeds(x_s, batch=batch)
    size = target.square().sum(1)

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        distances, gradients = encoder.residual(x.view(-1, *x_s.shape[1:]), target, batch)
        return distances, gradients.flatten(1)

    step = grid.steps(x_s, bits)
    # The largest number of a token is what says its step, so it keeps an outermost level.
    anchors = torch.zeros_like(x_s).scatter_(-1, x_s.abs().argmax(-1, keepdim=True), 1.0).bool()
    settled = Settling(residual, step.expand_as(x_s).flatten(1), bits, size, anchors.flatten(1))

    def told(done: int, distances: Tensor) -> None:
        tell(done, float(distances.sum() / size.sum()))

    return settled.run(x_s.flatten(1), synthetic.settle_passes, told).view_as(x_s)


@dataclass(frozen=True)
class Settling:
    """Minimises ``residual`` over x (m, D) whose numbers lie on the grids of ``step`` (m, D).

    ``size`` (m,): squared norms of the targets; ``anchors`` (m, D) bool: numbers that are rounded first and stay.
    """

    residual: Callable[[Tensor], tuple[Tensor, Tensor]]
    step: Tensor
    bits: int
    size: Tensor
    anchors: Tensor

    def run(self, x: Tensor, passes: int, tell: Callable[[int, Tensor], None]) -> Tensor:
        """About ``passes`` evaluations from ``x`` (m, D), of which two fifths move single numbers at the end."""
        share = max(1, round(0.6 * passes / (ROUNDS + 1)))
        free, done, total = ~self.anchors, 0, x.shape[1]
        x = torch.where(free, x, self.rounded(x))
        weight = torch.rand(total, generator=torch.Generator().manual_seed(0))  # the same order for each node
        for turn in range(1, ROUNDS + 1):
            turns = (2 if turn == 1 else 1) * share

            def told(step: int, distances: Tensor, before: int = done) -> None:
                tell(before + step, distances)

            x = self.fit(x, free, turns, told)
            done += turns
            left = int(total * KEEP**turn) if turn < ROUNDS else 0
            off = torch.where(free, (self.rounded(x) - x).abs() / self.step * weight, -1.0)
            free = off.argsort(1).argsort(1) >= total - left
            x = torch.where(free, x, self.rounded(x))
        return self.move(x, max(0, passes - done), lambda step, loss: tell(done + step, loss))

    def rounded(self, x: Tensor) -> Tensor:
        return grid.on_grid(x, self.step, self.bits)

    def fit(self, x: Tensor, free: Tensor, passes: int, tell: Callable[[int, Tensor], None]) -> Tensor:
        """`invert` of the free numbers; those beyond the grid are drawn back into it."""
        reach = self.step * (grid.top(self.bits) + 0.5)
        pull = self.size[:, None] / reach.square().sum(1, keepdim=True)

        def held(z: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            distance, gradient = self.residual(torch.where(free, z, x))
            beyond = (z.abs() - reach).clamp_min(0.0) * free
            return distance + (pull * beyond.square()).sum(1), (gradient + 2 * pull * beyond * z.sign()) * free

        return torch.where(free, invert(held, x, passes, torch.full_like(self.size, -1.0), tell), x)

    def move(self, x: Tensor, passes: int, tell: Callable[[int, Tensor], None]) -> Tensor:
        """Some numbers at once, those with the steepest descent, by one level; kept where the distance falls."""
        loss, gradient = self.residual(x)
        count, resting = torch.full((len(x),), 8.0), torch.zeros_like(x)
        reach = self.step * (grid.top(self.bits) + 0.25)
        for turn in range(passes):
            to = x - gradient.sign() * self.step
            able = (to.abs() <= reach) & (resting <= turn) & ~self.anchors
            order = torch.where(able, gradient.abs() * self.step, 0.0).argsort(1, descending=True).argsort(1)
            chosen = (order < count[:, None]) & able
            there = self.rounded(torch.where(chosen, to, x))
            new_loss, new_gradient = self.residual(there)
            better = new_loss < loss
            resting = torch.where(chosen & ~better[:, None], float(turn + 1 + WAIT), resting)
            count = torch.where(better, 1.3 * count, 0.5 * count).clamp(1.0, 400.0)
            x, gradient = torch.where(better[:, None], there, x), torch.where(better[:, None], new_gradient, gradient)
            loss = torch.where(better, new_loss, loss)
            tell(turn + 1, loss)
        return x
