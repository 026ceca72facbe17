"""The norms of the kernel: square roots of the diagonal of the propagated S."""

import warnings

import numpy as np
import pytest
import reference
import torch

from talk_dist.kernel.sntk import node_norms, propagation, to_torch


def norms_of(graph, h_t, hops, layers=1, propagate="mean", **settings):
    p = propagation(*graph.csr(), propagate)
    return node_norms(to_torch(p, torch.float64) @ h_t, [p] * (hops - 1), layers, **settings)


@pytest.mark.parametrize("kind", ["exact", "linear"])
@pytest.mark.parametrize("propagate", ["mean", "sym"])
@pytest.mark.parametrize("layers", [1, 2])
def test_norms_are_the_dense_diagonal(graph, layers, propagate, kind):
    """``exact``: at each of three hops; ``linear``: the length of the encoding propagated so often."""
    h_t, h_s = graph.encodings()
    _, truth = reference.joint_ntk(reference.propagation(graph.adjacency, propagate), h_t, h_s, 3, layers, kind)
    every_norm = norms_of(graph, h_t, 3, layers, propagate, kind=kind)
    for mine, theirs in zip(every_norm, truth, strict=True):
        torch.testing.assert_close(mine, theirs[: len(h_t)], rtol=1e-7, atol=0)


@pytest.mark.parametrize("propagate", ["mean", "sym"])
def test_linear_norms_are_too_small_after_the_first_hop(graph, propagate):
    """Equal at hop 1, never larger, and smaller wherever the neighbours' encodings differ."""
    h_t, _ = graph.encodings()
    exact, linear = (norms_of(graph, h_t, 3, 1, propagate, kind=kind) for kind in ("exact", "linear"))
    torch.testing.assert_close(linear[0], exact[0], rtol=1e-14, atol=0)
    alone = graph.adjacency.sum(1) == 1
    for hop in (1, 2):
        assert (linear[hop] <= exact[hop] * (1 + 1e-7)).all()
        torch.testing.assert_close(linear[hop][alone], exact[hop][alone], rtol=1e-7, atol=0)
        assert (linear[hop][~alone] < 0.999 * exact[hop][~alone]).any()


def test_with_exact_norms_no_correlation_leaves_its_range(graph):
    """|rho| <= 1 with exact norms (Cauchy-Schwarz); linear norms push some beyond, where the gradient dies."""
    h_t, _ = graph.encodings()
    p = reference.propagation(graph.adjacency, "mean")
    z = p @ h_t
    sigma = torch.outer(z.norm(dim=1), z.norm(dim=1))
    sigma = p @ (reference.arc_cosine((z @ z.T / sigma).clamp(-1, 1))[1] * sigma) @ p.T
    largest = {}
    for kind in ("exact", "linear"):
        n = norms_of(graph, h_t, 2, kind=kind)[1]
        largest[kind] = float((sigma / torch.outer(n, n)).max())
    assert largest["exact"] == pytest.approx(1.0, abs=1e-7)
    assert largest["linear"] > 1.05


@pytest.mark.parametrize("hops", [2, 3])
def test_beyond_the_degree_cap_norms_are_linear_with_a_warning(graph, hops):
    """Only nodes whose receptive field exceeds the cap fall back, and the warning counts them."""
    h_t, _ = graph.encodings()
    cap = 6
    exact, linear = norms_of(graph, h_t, hops), norms_of(graph, h_t, hops, kind="linear")
    reached = torch.eye(len(h_t), dtype=torch.float64)
    large = []  # at hops 2..K: more than `cap` nodes within 1..K-1 steps, the largest set that is summed over pairs
    for _ in range(1, hops):
        reached = (reached @ graph.adjacency > 0).double()
        large.append(reached.sum(1) > cap)
    assert 0 < sum(int(rows.sum()) for rows in large) < len(h_t)
    total = sum(int(rows.sum()) for rows in large)
    with pytest.warns(UserWarning, match=rf"{total} nodes have more than {cap} nodes .* raise kernel.degree_cap"):
        capped = norms_of(graph, h_t, hops, degree_cap=cap)
    torch.testing.assert_close(capped[0], exact[0])
    for hop, rows in enumerate(large, start=1):
        torch.testing.assert_close(capped[hop], torch.where(rows, linear[hop], exact[hop]), rtol=1e-12, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norms_of(graph, h_t, hops, degree_cap=len(h_t))


def test_norms_do_not_depend_on_the_row_order_of_a_matrix(graph):
    """A subset of rows (one shard's) has the norms of these rows: nothing of other rows enters."""
    h_t, _ = graph.encodings()
    whole = norms_of(graph, h_t, 3)
    p = propagation(*graph.csr(), "mean")
    wanted = np.array([0, 3, 17, 59])
    middle = np.unique(p[wanted].indices)
    outer = np.unique(p[middle].indices)
    z = to_torch(p, torch.float64) @ h_t
    part = node_norms(z[torch.from_numpy(outer).long()], [p[middle][:, outer], p[wanted][:, middle]])
    for mine, theirs, rows in zip(part, whole, (outer, middle, wanted), strict=True):
        torch.testing.assert_close(mine, theirs[torch.from_numpy(rows).long()], rtol=1e-12, atol=0)


def test_norms_in_batches_are_those_at_once(graph, monkeypatch):
    h_t, _ = graph.encodings()
    whole = norms_of(graph, h_t, 2)
    monkeypatch.setattr("talk_dist.kernel.sntk._BATCH_ELEMENTS", 1)
    for one, other in zip(norms_of(graph, h_t, 2), whole, strict=True):
        torch.testing.assert_close(one, other)
