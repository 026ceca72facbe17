"""The graph-aware neural tangent kernel between real rows and synthetic columns (TaLK, arXiv 2606.22975;
arc-cosine maps of Cho & Saul 2009, recursion of Arora et al. 2019 and, on graphs, of GC-SNTK 2024).

Pure functions of torch tensors. A kernel has K hops of propagation with L non-linear layers each. The
synthetic graph has self-loops only, so its propagation is the identity and the first hop of the real side
is folded into the encodings: Z = P H is all that a block needs (method, section 4).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

# d k0 / d rho = 1 / (pi sqrt(1 - rho^2)) has a pole at 1: the slope is bounded as if rho were at most this.
# Values are not clipped: clipping rho takes 0.45 % off the diagonal of K_ss, a *negative* ridge larger than
# the ridge itself, and K_ss is then no longer positive semi-definite.
SLOPE_CLIP = 0.9999
TINY = 1e-30
_BATCH_ELEMENTS = 1 << 23  # numbers in one batch of neighbourhoods, when norms are exact


def arc_cosine(rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arc-cosine maps at the correlations ``rho`` (any shape, in [-1, 1]), and sqrt(1 - rho^2).

    Of degree 0 and 1, normalised to 1 at rho = 1: k0 = (pi - arccos rho) / pi and k1 = rho k0 + sqrt(1 - rho^2) / pi,
    whose derivatives are 1 / (pi sqrt(1 - rho^2)) and k0.
    """
    root = torch.addcmul(rho.new_ones(()), rho, rho, value=-1.0).sqrt_()
    k0 = torch.arccos(rho).mul_(-1.0 / math.pi).add_(1.0)
    return k0, torch.mul(rho, k0).add_(root, alpha=1.0 / math.pi), root


def propagation(indptr: np.ndarray, indices: np.ndarray, degree: np.ndarray, kind: str) -> sp.csr_matrix:
    """Row-wise propagation P (rows, columns) of a graph with self-loops, weighted by *global* degrees.

    ``mean``: P = D^-1 A (the paper's); ``sym``: P = D^-1/2 A D^-1/2 (what a GCN student uses).
    ``degree`` (columns,) counts the self-loop; a row has all the neighbours of its node.
    """
    rows = len(indptr) - 1
    per_row = np.repeat(np.diff(indptr), np.diff(indptr)).astype(np.float64)
    weights = 1.0 / per_row if kind == "mean" else 1.0 / np.sqrt(per_row * degree[indices])
    return sp.csr_matrix((weights, indices, indptr), shape=(rows, len(degree)))


def to_torch(matrix: sp.csr_matrix, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """A scipy CSR matrix as a torch one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.data).to(dtype),
            size=matrix.shape,
            device=device,
            check_invariants=False,
        )


Hop = tuple[Tensor, Tensor]  # a sparse matrix (r_k+1, r_k) and its transpose


class KernelBlock:
    """Kernel K (r_K, M) between real rows and synthetic columns, and its gradient by hand (method, section 3).

    K is homogeneous of degree one on either side: what is computed is the kernel of *directions*, ``unit`` (r_K, M),
    and K = n unit m with the lengths n (r_K,) and m (M,) of both sides. Lengths meet vectors and narrow matrices alone,
    so that a block costs two products of its size with the width d and a few element-wise passes.

    ``z`` (r_1, d): directions of P H in the receptive field of the wanted rows; ``h_s`` (M, d): synthetic encodings;
    ``propagations``: of hops 2..K the matrix (r_k+1, r_k) as it acts on directions, see `between_directions`; ``norms``
    (r_K,): n of the last hop. `pull` may be asked once, if ``keep``: it consumes what it needs. ``itself``: row i is
    column i, whose correlation is one; computed, its rounding would cost half of the digits (arccos is steep there).
    """

    def __init__(
        self,
        z: Tensor,
        h_s: Tensor,
        propagations: Sequence[Hop],
        norms: Tensor,
        layers: int = 1,
        keep: bool = True,
        itself: bool = False,
    ):
        self.lengths = torch.linalg.vector_norm(h_s, dim=1, keepdim=True).clamp_min(TINY)
        self._z, self._propagations, self._layers, self._norms = z, propagations, layers, norms[:, None]
        self._tape: list[tuple[Tensor, Tensor, Tensor]] = []  # of each layer: theta before it, k0, sqrt(1 - rho^2)
        theta = rho = z @ (h_s / self.lengths).T
        if itself:
            rho.fill_diagonal_(1.0)
        for hop in range(len(propagations) + 1):
            if hop:
                forward, _ = propagations[hop - 1]
                rho, theta = forward @ rho, forward @ theta
            rho.clamp_(-1.0, 1.0)
            for _ in range(layers):
                k0, k1, root = arc_cosine(rho)
                if keep:
                    self._tape.append((theta, k0, root))
                rho, theta = k1, torch.addcmul(k1, theta, k0)
        self.unit = theta

    @property
    def diagonal_factor(self) -> float:
        """K_jj over |h_j|^2 of a block of nodes with themselves: each layer adds one."""
        return 1.0 + self._layers

    def dense(self) -> Tensor:
        """K itself (r_K, M)."""
        return self._norms * self.unit * self.lengths.T

    def times(self, b: Tensor) -> Tensor:
        """K b (r_K, C)."""
        return self._norms * (self.unit @ (self.lengths * b))

    def transposed_times(self, g: Tensor) -> Tensor:
        """K^T g (M, C)."""
        return self.lengths * (self.unit.T @ (self._norms * g))

    def pull(self, g: Tensor, b: Tensor, out: Tensor) -> None:
        """Add to ``out`` (M, d) the gradient of <K b, g>, for fixed b (M, C) and g (r_K, C), with respect to the
        directions of h_s, over their lengths: what `through_lengths` makes a gradient with respect to h_s."""
        d_theta, d_rho = (
            (self._norms * g) @ b.T,
            torch.zeros((), dtype=g.dtype),
        )  # of the last layer's rho nothing is asked
        floor, tape = math.sqrt(1.0 - SLOPE_CLIP**2), self._tape
        for hop in range(len(self._propagations), -1, -1):
            for _ in range(self._layers):
                theta, k0, root = tape.pop()
                slope = torch.div(theta, root.clamp_min_(floor), out=root)  # pi times the slope of theta k0
                d_k1 = d_rho.add_(d_theta) if d_rho.ndim else d_theta
                through_k1 = torch.mul(d_k1, k0)
                d_rho = torch.addcmul(through_k1, d_theta, slope, value=1.0 / math.pi)
                d_theta = through_k1 if d_k1 is d_theta else d_theta.mul_(k0)
            if hop:
                _, backward = self._propagations[hop - 1]
                d_rho, d_theta = backward @ d_rho, backward @ d_theta
        out.addmm_(d_rho.add_(d_theta).T, self._z)


def through_lengths(pulled: Tensor, h_s: Tensor, b: Tensor, d_b: Tensor) -> Tensor:
    """The gradient with respect to h_s (M, d) of what `KernelBlock.pull` was asked for, from the sum of all that was
    ``pulled`` (M, d): K = unit m, so that a node's length sees <b, d_b>, with ``d_b`` (M, C) the sum of K^T g."""
    lengths = torch.linalg.vector_norm(h_s, dim=1, keepdim=True).clamp_min(TINY)
    directions = h_s / lengths
    along = (b * d_b).sum(1, keepdim=True) / lengths
    return pulled + (along - (directions * pulled).sum(1, keepdim=True)) * directions


def between_directions(
    matrix: sp.csr_matrix, before: np.ndarray, after: np.ndarray, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Hop:
    """A propagation (rows, columns) as it acts on directions, and its transpose: columns times their norms ``before``
    (columns,), rows over theirs ``after`` (rows,)."""
    scaled = sp.diags_array(1.0 / np.maximum(after, TINY)) @ matrix @ sp.diags_array(before)
    return to_torch(scaled, dtype, device), to_torch(scaled.T.tocsr(), dtype, device)


def synthetic_block(h_s: Tensor, hops: int, layers: int = 1) -> KernelBlock:
    """Kernel of the synthetic nodes (M, d) with themselves: symmetric to rounding, positive semi-definite.

    With the identity as propagation the diagonal never changes, so that hops are layers like any others.
    """
    lengths = torch.linalg.vector_norm(h_s, dim=1)
    return KernelBlock(h_s / lengths.clamp_min(TINY)[:, None], h_s, [], lengths, hops * layers, itself=True)


def synthetic_kernel(h_s: Tensor, hops: int, layers: int = 1) -> Tensor:
    """`synthetic_block` as a matrix (M, M)."""
    return symmetric(synthetic_block(h_s, hops, layers).dense())


def symmetric(matrix: Tensor) -> Tensor:
    """Its symmetric part."""
    return (matrix + matrix.T) / 2


def node_norms(
    z: Tensor,
    propagations: Sequence[sp.csr_matrix],
    layers: int = 1,
    kind: str = "exact",
    degree_cap: int = 512,
) -> list[Tensor]:
    """Square roots of the diagonal of the propagated S at each hop: K tensors, shapes (r_1,), .., (r_K,).

    ``linear``: ||(P^k H)_i||, the approximation of the paper's code: exact at hop 1, too small afterwards.
    ``exact``: sums over pairs of neighbours. It depends on the real encodings only, so it is paid once per
    encoding. A node whose receptive field exceeds ``degree_cap`` takes the linear value, with a warning.
    """
    norms = [torch.linalg.vector_norm(z, dim=1)]
    smoothed = z
    for matrix in propagations:
        smoothed = to_torch(matrix, z.dtype, z.device) @ smoothed
        norms.append(torch.linalg.vector_norm(smoothed, dim=1))
    if kind == "linear":
        return norms
    capped = _first_hop_norms(z, propagations[0], layers, degree_cap, norms[1]) if propagations else 0
    for hop, matrix in enumerate(propagations[1:], start=2):
        for row in range(matrix.shape[0]):
            span = slice(matrix.indptr[row], matrix.indptr[row + 1])
            covariance = _covariance(z, propagations[: hop - 1], matrix.indices[span], layers, degree_cap)
            if covariance is None:
                capped += 1
                continue
            weight = torch.from_numpy(matrix.data[span]).to(z)
            norms[hop][row] = (weight @ covariance @ weight).clamp_min(0.0).sqrt()
    if capped:
        warnings.warn(
            f"{capped} nodes have more than {degree_cap} nodes in their receptive field and take linear norms; "
            "raise kernel.degree_cap to make them exact",
            stacklevel=2,
        )
    return norms


def _first_hop_norms(z: Tensor, matrix: sp.csr_matrix, layers: int, cap: int, out: Tensor) -> int:
    """Exact norms of hop 2 into ``out``, all rows of one degree at once; the number of rows beyond the cap."""
    degrees = np.diff(matrix.indptr)
    for degree in np.unique(degrees[(degrees > 0) & (degrees <= cap)]):
        rows = np.flatnonzero(degrees == degree)
        size = max(1, _BATCH_ELEMENTS // int(degree * (z.shape[1] + 4 * degree)))
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            entries = matrix.indptr[batch][:, None] + np.arange(degree)
            near = z[torch.from_numpy(matrix.indices[entries].astype(np.int64))]
            covariance = _activate(near @ near.mT, layers)
            weight = torch.from_numpy(matrix.data[entries]).to(z)[:, :, None]
            squares = (weight.mT @ covariance @ weight).clamp_min(0.0)
            out[torch.from_numpy(batch)] = squares.sqrt().view(-1)
    return int((degrees > cap).sum())


def _activate(raw: Tensor, layers: int) -> Tensor:
    """S after the non-linear layers of a hop, among some nodes (..., n, n), from what was propagated."""
    n = raw.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    scale = (n[..., :, None] * n[..., None, :]).clamp_min(TINY)
    for _ in range(layers):
        raw = arc_cosine((raw / scale).clamp_(-1.0, 1.0))[1] * scale
    return raw


def _covariance(
    z: Tensor, propagations: Sequence[sp.csr_matrix], nodes: np.ndarray, layers: int, cap: int
) -> Tensor | None:
    """S among ``nodes`` (columns of the next hop) after hop len(propagations) + 1; None beyond the cap."""
    if len(nodes) > cap:
        return None
    if not propagations:
        rows = z[torch.from_numpy(nodes.astype(np.int64))]
        raw = rows @ rows.T
    else:
        sub = propagations[-1][nodes]
        support, local = np.unique(sub.indices, return_inverse=True)
        inner = _covariance(z, propagations[:-1], support, layers, cap)
        if inner is None:
            return None
        weights = sp.csr_matrix((sub.data, local, sub.indptr), shape=(len(nodes), len(support)))
        dense = torch.from_numpy(weights.toarray()).to(z)
        raw = dense @ inner @ dense.T
    return _activate(raw, layers)
