"""The kernel block against dense truth, and the arc-cosine maps against their definitions."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from talk_dist.kernel.sntk import (
    SLOPE_CLIP,
    KernelBlock,
    arc_cosine,
    between_directions,
    node_norms,
    propagation,
    synthetic_block,
    synthetic_kernel,
    through_lengths,
    to_torch,
)

FLOAT = {"dtype": torch.float64}


def block_on_whole_graph(graph, h_t, h_s, hops, layers, kind, norms="exact"):
    """What a shard does, on the whole graph: the first hop is folded into Z, the others are sparse products."""
    p = propagation(*graph.csr(), kind)
    z = to_torch(p, torch.float64) @ h_t
    every_norm = node_norms(z, [p] * (hops - 1), layers, norms)
    lengths = [n.numpy() for n in every_norm]
    between = [between_directions(p, before, after, torch.float64) for before, after in itertools.pairwise(lengths)]
    directions = z / every_norm[0].clamp_min(1e-30)[:, None]
    return KernelBlock(directions, h_s, between, every_norm[-1], layers), every_norm


def gradient_of(block, h_s, g, b):
    """d <K b, g> / d h_s by hand."""
    pulled = torch.zeros_like(h_s)
    d_b = block.transposed_times(g)
    block.pull(g, b, pulled)
    return through_lengths(pulled, h_s, b, d_b)


@pytest.mark.parametrize("kind", ["mean", "sym"])
def test_propagation_is_dense(graph, kind):
    """P of a subset of rows (own nodes first, global degrees) is those rows of the dense P."""
    indptr, indices, degree = graph.csr()
    own = 23
    p = propagation(indptr[: own + 1], indices[: indptr[own]], degree, kind)
    assert p.shape == (own, len(degree))
    np.testing.assert_allclose(p.toarray(), reference.propagation(graph.adjacency, kind)[:own], rtol=1e-14)


@pytest.mark.parametrize("norms", ["exact", "linear"])
@pytest.mark.parametrize("kind", ["mean", "sym"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_block_and_synthetic_kernel_are_blocks_of_the_dense_kernel(graph, hops, layers, kind, norms):
    """K_ts and K_ss are blocks of the kernel of both graphs taken as one: the first hop is free, S starts from Z."""
    h_t, h_s = graph.encodings()
    p, n = reference.propagation(graph.adjacency, kind), len(h_t)
    whole, truth = reference.joint_ntk(p, h_t, h_s, hops, layers, norms)
    block, _ = block_on_whole_graph(graph, h_t, h_s, hops, layers, kind, norms)
    torch.testing.assert_close(block.dense(), whole[:n, n:], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(synthetic_kernel(h_s, hops, layers), whole[n:, n:], rtol=1e-6, atol=0)
    # the two other forms of the reference, which the gradient tests differentiate, are the same mathematics
    real = [norm[:n] for norm in truth]
    torch.testing.assert_close(reference.kernel_ts(p, h_t, h_s, real, layers), whole[:n, n:], rtol=1e-12, atol=1e-12)
    exact = reference.kernel_ss(
        h_s, hops, layers
    )  # `whole` has half of the digits where rho = 1: arccos is steep there
    torch.testing.assert_close(synthetic_kernel(h_s, hops, layers), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.diagonal(), (1 + hops * layers) * h_s.square().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_block_and_its_gradient_by_hand_are_autograd_of_the_dense_kernel(graph, hops, layers):
    """K b, K^T g and the derivative of <K b, g>, with nothing but products with narrow matrices."""
    h_t, h_s = graph.encodings()
    rng = torch.Generator().manual_seed(hops + 10 * layers)
    b, g = (torch.randn(n, 3, generator=rng, **FLOAT) for n in (len(h_s), len(h_t)))
    p = reference.propagation(graph.adjacency, "mean")
    _, truth = reference.joint_ntk(p, h_t, h_s, hops, layers)
    leaf = h_s.clone().requires_grad_()
    k = reference.kernel_ts(p, h_t, leaf, [norm[: len(h_t)] for norm in truth], layers)
    (expected,) = torch.autograd.grad((k @ b * g).sum(), leaf)
    block, _ = block_on_whole_graph(graph, h_t, h_s, hops, layers, "mean")
    torch.testing.assert_close(block.times(b), (k @ b).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block.times(torch.stack([b, 2 * b]))[1], 2 * (k @ b).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block.transposed_times(g), (k.T @ g).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient_of(block, h_s, g, b), expected, rtol=1e-8, atol=1e-10)


@given(st.floats(-1, 1))
@settings(max_examples=30, deadline=None)
@example(1.0)
@example(-1.0)
@example(0.5)
def test_arc_cosine_maps_are_expectations_over_gaussians(rho):
    """k0 = 2 E[1(u>0) 1(v>0)] and k1 = 2 E[relu(u) relu(v)] for standard Gaussians u, v of correlation rho."""
    k0, k1, _ = arc_cosine(torch.tensor(rho, **FLOAT))
    theta = math.acos(rho)
    # both factors are positive on an arc of pi - theta, in polar coordinates with E[r^2] = 2
    low, high = theta - math.pi / 2, math.pi / 2
    nodes, weights = np.polynomial.legendre.leggauss(40)
    angle = (high - low) / 2 * nodes + (high + low) / 2
    integral = (high - low) / 2 * (weights * np.cos(angle) * np.cos(angle - theta)).sum()
    assert float(k0) == pytest.approx((high - low) / math.pi, abs=1e-7)
    assert float(k1) == pytest.approx(2 / math.pi * integral, abs=1e-12)


def test_k0_is_taken_at_rho():
    """By hand, one hop of one node at an angle of 60 degrees: 1/2 * 2/3 + (1/3 + sqrt(3)/2/pi).

    A published implementation takes k0 at k1 instead; the value below would then be larger by 0.02.
    """
    expected = 0.5 * (2 / 3) + (1 / 3 + math.sqrt(0.75) / math.pi)
    h = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], **FLOAT)
    block = KernelBlock(h[:1], h[1:], [], torch.ones(1, **FLOAT)).dense()
    assert float(block) == pytest.approx(expected, abs=1e-12)
    assert float(synthetic_kernel(h, 1)[0, 1]) == pytest.approx(expected, abs=1e-12)
    k1 = expected - 1 / 3
    assert abs(0.5 * (math.pi - math.acos(k1)) / math.pi + k1 - expected) > 0.01  # the bug would be seen


def test_slope_is_the_derivative_and_bounded():
    """Of rho k0 + k1 between two directions: inside the clip the derivative, beyond it with that of k0 frozen there."""
    z = torch.tensor([[1.0, 0.0]], **FLOAT)
    one = torch.ones(1, 1, **FLOAT)

    def at(angle):
        h = torch.tensor([[math.cos(angle), math.sin(angle)]], **FLOAT)
        block = KernelBlock(z, h, [], one[0])
        pulled = torch.zeros_like(h)
        block.pull(one, one, pulled)
        return float(block.dense()), float(pulled[0, 0])  # the slope times z

    for angle in np.linspace(0.1, math.pi - 0.1, 9):
        rho, step = math.cos(angle), 1e-6
        above, below = (at(math.acos(rho + move))[0] for move in (step, -step))
        assert at(angle)[1] == pytest.approx((above - below) / (2 * step), rel=1e-6)
    steepest = 1 / (math.pi * math.sqrt(1 - SLOPE_CLIP**2))
    for angle in (0.0, 1e-6, 1e-3, math.acos(SLOPE_CLIP)):
        k0 = 1 - angle / math.pi
        assert at(angle)[1] == pytest.approx(math.cos(angle) * steepest + 2 * k0, rel=1e-6)
    value = arc_cosine(torch.tensor([1.0, -1.0], **FLOAT))
    torch.testing.assert_close(value[0], torch.tensor([1.0, 0.0], **FLOAT), rtol=0, atol=0)
    torch.testing.assert_close(value[1], torch.tensor([1.0, 0.0], **FLOAT), rtol=0, atol=1e-15)


@st.composite
def encodings(draw):
    """Random rows, some repeated, some scaled, some nearly the same, maybe one of zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = rng.normal(size=(draw(st.integers(1, 4)), draw(st.integers(1, 5)))) + draw(st.sampled_from([0.0, 3.0]))
    rows = [base, base * 2.5, base + 1e-4 * rng.normal(size=base.shape), base[:1], 0 * base[:1]]
    return torch.from_numpy(
        np.concatenate(list(itertools.compress(rows, draw(st.tuples(*[st.booleans()] * 5)))) or [base])
    )


@given(encodings(), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_synthetic_kernel_is_symmetric_and_positive_semi_definite(h_s, hops, layers):
    """Whatever the encodings: equal, parallel, nearly equal, zero. Also finite, with a finite gradient."""
    k = synthetic_kernel(h_s, hops, layers)
    assert torch.equal(k, k.T)
    values = torch.linalg.eigvalsh(k)
    assert values[0] >= -1e-7 * max(1e-30, k.diagonal().mean().item())
    g, b = torch.randn(2, len(h_s), 3, generator=torch.Generator().manual_seed(0), **FLOAT)
    assert torch.isfinite(gradient_of(synthetic_block(h_s, hops, layers), h_s, g, b)).all()


def test_clipping_values_would_break_positive_semi_definiteness(monkeypatch):
    """Why only the slope is clipped: with rho cut to 0.9999 near-duplicates make K_ss indefinite, beyond the ridge."""
    angle = 0.01 * torch.arange(12, **FLOAT)  # neighbours correlate above the clip, others below
    h_s = torch.stack([angle.cos(), angle.sin()], 1).repeat_interleave(2, 0)
    k = synthetic_kernel(h_s, 2)
    assert torch.linalg.eigvalsh(k)[0] > -1e-7 * k.diagonal().mean()

    def clipped(rho):
        rho = rho.clamp(-SLOPE_CLIP, SLOPE_CLIP)
        return *reference.arc_cosine(rho), (1 - rho**2).sqrt()

    monkeypatch.setattr("talk_dist.kernel.sntk.arc_cosine", clipped)
    k = synthetic_kernel(h_s, 2)
    assert torch.linalg.eigvalsh(k)[0] < -1e-3 * k.diagonal().mean()


def test_zero_encodings_give_a_zero_kernel_and_no_nan(graph):
    """An encoding of length zero has no angle; it must not poison the others."""
    h_t, h_s = graph.encodings()
    h_t[-1] = 0.0  # isolated: its propagated encoding is zero, too
    h_s[2] = 0.0
    block, _ = block_on_whole_graph(graph, h_t, h_s, 2, 1, "mean")
    dense, ones = block.dense(), torch.ones(len(h_t) + len(h_s), 1, **FLOAT)
    assert torch.isfinite(gradient_of(block, h_s, ones[: len(h_t)], ones[: len(h_s)])).all()
    assert float(torch.cat([dense[-1], dense[:, 2]]).abs().max()) < 1e-12
    assert float(dense[:-1, [0, 1, 3, 4]].abs().min()) > 0.0
