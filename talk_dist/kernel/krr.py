"""Kernel ridge regression from M synthetic nodes: dual coefficients, losses, and the gradient completed by
hand (method, sections 3 and 4).

A shard returns sums over its own training rows; what is here turns their total into the gradient of the
whole loss with respect to the synthetic encodings, labels and the temperature, without one autograd graph
over everything. M is small: all of it is done in float64 on the driver.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talk_dist.errors import NotPSDError
from talk_dist.kernel.sntk import KernelBlock, through_lengths

JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True)
class DualSolution:
    """B = A^-1 y_s with A = K_ss + ridge * trace(K_ss)/M * I."""

    dual: Tensor  # (M, C) float64
    factor: Tensor  # (M, M) lower Cholesky factor of A
    ridge: float  # with the jitter that was needed


def dual_coefficients(k_ss: Tensor, y_s: Tensor, ridge: float) -> DualSolution:
    """Solve for the dual coefficients in float64. ``ridge`` is relative to the mean diagonal of K_ss.

    Escalates a relative jitter with a warning; raises NotPSDError, naming it, if the largest is too small.
    """
    k_ss, y_s = k_ss.double(), y_s.double()
    mean_diagonal = k_ss.diagonal().mean()
    eye = torch.eye(len(k_ss), dtype=torch.float64, device=k_ss.device)
    for jitter in JITTERS:
        factor, info = torch.linalg.cholesky_ex(k_ss + (ridge + jitter) * mean_diagonal * eye)
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            if jitter:
                warnings.warn(f"K_ss needed a jitter of {jitter:g} times its mean diagonal", stacklevel=2)
            return DualSolution(torch.cholesky_solve(y_s, factor), factor, ridge + jitter)
    raise NotPSDError(
        f"the kernel of the {len(k_ss)} synthetic nodes is not positive definite with ridge {ridge:g} and jitter "
        f"{JITTERS[-1]:g} (mean diagonal {float(mean_diagonal):.3g}); raise kernel.ridge or lower outer.lr"
    )


def ridge_path(k_ss: Tensor, y_s: Tensor, ridges: Sequence[float]) -> Tensor:
    """Dual coefficients (R, M, C) float64 for a ladder of R ridges, from one eigendecomposition of K_ss.

    Eigenvalues that rounding left below zero count as zero. Raises NotPSDError for a ridge that is zero where one is.
    """
    k_ss, y_s = k_ss.double(), y_s.double()
    values, vectors = torch.linalg.eigh(k_ss)
    shifted = values.clamp_min(0.0) + torch.tensor(ridges, dtype=torch.float64)[:, None] * k_ss.diagonal().mean()
    if bool((shifted <= 0).any()):
        raise NotPSDError(f"K_ss is singular and one of the ridges {list(ridges)} is zero; leave that out")
    return vectors @ ((vectors.T @ y_s) / shifted[:, :, None])


@dataclass(frozen=True)
class LossSums:
    """Sums over rows: the loss, its derivative with respect to each score, and to the log temperature."""

    loss: Tensor  # ()
    d_scores: Tensor  # (rows, C)
    d_log_temperature: Tensor  # ()


def loss_sums(scores: Tensor, targets: Tensor, kind: str, log_temperature: float = 0.0) -> LossSums:
    """Loss of the scores F (rows, C) against class probabilities ``targets`` (rows, C), *summed* over rows.

    ``mse``: squared distance (the paper's, with one-hot labels as targets). ``ce``: cross-entropy of
    softmax(exp(log_temperature) * F), whose temperature is learned beside the synthetic set.
    """
    if kind == "mse":
        residual = scores - targets
        return LossSums((residual * residual).sum(), 2.0 * residual, scores.new_zeros(()))
    sharpness = float(torch.tensor(log_temperature, dtype=torch.float64).exp())
    log_p = torch.log_softmax(sharpness * scores, dim=1)
    d_logits = log_p.exp() - targets
    return LossSums(-(targets * log_p).sum(), sharpness * d_logits, sharpness * (d_logits * scores).sum())


def loss_scale(kind: str, num_rows: int, num_classes: int) -> float:
    """What the summed loss is divided by: the mean over rows, and for ``mse`` over classes too."""
    return 1.0 / (num_rows * num_classes) if kind == "mse" else 1.0 / num_rows


def complete_gradient(
    h_s: Tensor, kernel: KernelBlock, solution: DualSolution, d_dual: Tensor, d_hs: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient with respect to h_s (M, d) and y_s (M, C), from what the shards summed.

    ``kernel``: the block of h_s with itself that ``solution`` is of; its gradient is asked for here. ``d_dual`` = dL/dB
    (M, C), that is sum_p K_p^T dL/dF_p; ``d_hs`` = sum_p VJP of K_p at dL/dF_p B^T. G_A = -A^-T dL/dB B^T and
    G_K = G_A + (ridge/M) trace(G_A) I, whose second part meets the diagonal alone. K_ss depends on h_s from either
    side, so that its VJP at G_K is that of its columns at G_K + G_K^T: of rank 2 C but for the diagonal.
    """
    h_s = h_s.double()
    d_labels = torch.cholesky_solve(d_dual.double(), solution.factor)
    g, b = torch.cat([-d_labels, solution.dual], 1), torch.cat([solution.dual, -d_labels], 1)
    pulled = torch.zeros_like(h_s)
    kernel.pull(g, b, pulled)
    through_kernel = through_lengths(pulled, h_s, b, kernel.transposed_times(g))
    on_diagonal = solution.ridge / len(h_s) * -(d_labels * solution.dual).sum()
    return d_hs.double() + through_kernel + 2.0 * on_diagonal * kernel.diagonal_factor * h_s, d_labels
