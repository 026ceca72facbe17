"""A student's training as a differentiable function of the encodings that it is trained on.

The kernel predictor stands for a student that is infinitely wide; a real one is narrow, takes some two hundred passes
of AdamW with dropout, and stops. `Unrolled` trains such a one and takes a gradient with respect to its final weights
back through every pass to the encodings (back-propagation through training: Domke 2012; Maclaurin, Duvenaud & Adams
2015). The passes are kept as weights and moments alone, and each is done again on the way back, so memory does not grow
with the size of the set.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from talk_dist.models.gnn import Student, drawing
from talk_dist.models.inner import diverged, soft_labels
from talk_dist.training import InnerConfig

BETA_1, BETA_2 = 0.9, 0.999  # AdamW's, as torch has them
EPSILON = 1e-5  # a thousand times torch's: a step is a sign where gradients are tiny, and that has no slope


class Unrolled:
    """``passes`` passes of `fit_encodings`'s recipe from ``student``'s weights, which stay as they are."""

    def __init__(self, student: Student, h_s: Tensor, y_s: Tensor, config: InnerConfig, passes: int, seed: int):
        """On encodings ``h_s`` (M, d) with labels ``y_s`` (M, C). Raises ConfigError if training diverges."""
        self._student, self._config, self._seed = student, config, seed
        self._h_s, self._targets = h_s.detach(), soft_labels(y_s).to(h_s)
        self._shapes = {name: value.shape for name, value in student.named_parameters()}
        weights = parameters_to_vector(student.parameters()).detach().to(h_s)
        first, second = torch.zeros_like(weights), torch.zeros_like(weights)
        self._trail: list[tuple[Tensor, Tensor, Tensor]] = []  # before each pass
        for index in range(1, passes + 1):
            self._trail.append((weights, first, second))
            gradient, _, _ = self._gradient(index, weights)
            if not bool(gradient.isfinite().all()):
                raise diverged(float("nan"), index)
            first, second = _moments(first, second, gradient)
            step = first / _bias(BETA_1, index) / ((second / _bias(BETA_2, index)).sqrt() + EPSILON)
            weights = self._kept_share * weights - config.gnn_lr * step
        self._last = weights

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name."""
        return self._named(self._last)

    def pull(self, d_weights: dict[str, Tensor]) -> Tensor:
        """The gradient (M, d) with respect to the encodings, from that with respect to the trained `weights`.

        AdamW's adjoint: of w' = a w - r m' / (s + e), where m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2 and
        s = sqrt(v'), both moments divided by their bias. How g depends on weights and encodings is a product of the
        loss's second derivatives with a vector.
        """
        rate = self._config.gnn_lr
        d_w = torch.cat([d_weights[name].to(self._last).flatten() for name in self._shapes])
        d_first, d_second, d_hs = torch.zeros_like(d_w), torch.zeros_like(d_w), torch.zeros_like(self._h_s)
        for index in range(len(self._trail), 0, -1):
            weights, first, second = self._trail[index - 1]
            gradient, leaf, h_s = self._gradient(index, weights, keep=True)
            g = gradient.detach()
            first, second = _moments(first, second, g)
            bias_1, bias_2 = _bias(BETA_1, index), _bias(BETA_2, index)
            root = (second / bias_2).sqrt()
            scale = rate / (bias_1 * (root + EPSILON))
            d_first = d_first - scale * d_w
            slope = torch.where(root > 0, scale * first / (root + EPSILON) / (2.0 * bias_2 * root), 0.0)
            d_second = d_second + slope * d_w
            d_g = (1.0 - BETA_1) * d_first + 2.0 * (1.0 - BETA_2) * g * d_second
            through_w, through_h = torch.autograd.grad(gradient, [leaf, h_s], d_g)
            d_w = self._kept_share * d_w + through_w
            d_first, d_second, d_hs = BETA_1 * d_first, BETA_2 * d_second, d_hs + through_h
        return d_hs

    @property
    def _kept_share(self) -> float:
        return 1.0 - self._config.gnn_lr * self._config.weight_decay

    def _gradient(self, index: int, weights: Tensor, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The loss's gradient in one pass, whose dropout depends on its number alone, and the leaves that it is a
        function of, to be differentiated again if ``keep``."""
        leaf, h_s = weights.detach().requires_grad_(), self._h_s.detach().requires_grad_(keep)
        with drawing(self._seed + index):
            logits = functional_call(self._student.train(), self._named(leaf), (h_s,))
        (gradient,) = torch.autograd.grad(cross_entropy(logits, self._targets), leaf, create_graph=keep)
        return gradient, leaf, h_s

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}


def _moments(first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return BETA_1 * first + (1.0 - BETA_1) * gradient, BETA_2 * second + (1.0 - BETA_2) * gradient.square()


def _bias(beta: float, index: int) -> float:
    return 1.0 - float(beta**index)
