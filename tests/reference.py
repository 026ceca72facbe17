"""The slow dense truth that the tests compare with: whole matrices in float64, from section 3 of the method alone.

N real nodes, M synthetic ones, K hops with L layers each. Nothing here is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy, elu, leaky_relu, one_hot


def adjacency(num_nodes, edges):
    """Dense (N, N) zeros and ones: undirected, one self-loop a node, repeats do not count."""
    a = torch.eye(num_nodes, dtype=torch.float64)
    for i, j in edges:
        a[i, j] = a[j, i] = 1.0
    return a


def propagation(a, kind):
    """Row-wise propagation: ``mean`` is D^-1 A, ``sym`` is D^-1/2 A D^-1/2."""
    degree = a.sum(1)
    return a / degree[:, None] if kind == "mean" else a / torch.outer(degree, degree).sqrt()


def arc_cosine(rho):
    """k0 = (pi - arccos rho) / pi and k1 = (rho (pi - arccos rho) + sqrt(1 - rho^2)) / pi."""
    angle = torch.arccos(rho)
    return (math.pi - angle) / math.pi, (rho * (math.pi - angle) + (1 - rho**2).sqrt()) / math.pi


def joint_ntk(p, h_t, h_s, hops, layers, norms="exact"):
    """The kernel of all N + M nodes as one graph, (N + M, N + M), and the norms (N + M,) of every hop.

    The real and the synthetic graph side by side are one graph whose propagation is diag(P, I).
    """
    p = torch.block_diag(p, torch.eye(len(h_s), dtype=p.dtype))
    h = smoothed = torch.cat([h_t, h_s])
    sigma = theta = h @ h.T
    every_norm = []
    for _ in range(hops):
        sigma, theta, smoothed = p @ sigma @ p.T, p @ theta @ p.T, p @ smoothed
        n = sigma.diagonal().sqrt() if norms == "exact" else smoothed.norm(dim=1)
        every_norm.append(n)
        for _ in range(layers):
            k0, k1 = arc_cosine((sigma / torch.outer(n, n)).clamp(-1, 1))
            sigma = k1 * torch.outer(n, n)
            theta = theta * k0 + sigma
    return theta, every_norm


def kernel_ts(p, h_t, h_s, norms, layers):
    """K_ts (N, M) by the recursion of the method, differentiable in h_s; ``norms``: n (N,) of every hop."""
    sigma = theta = h_t @ h_s.T
    for n in norms:
        sigma, theta = p @ sigma, p @ theta
        scale = torch.outer(n, h_s.norm(dim=1))
        for _ in range(layers):
            k0, k1 = arc_cosine((sigma / scale).clamp(-1, 1))
            sigma = k1 * scale
            theta = theta * k0 + sigma
    return theta


def kernel_ss(h_s, hops, layers):
    """K_ss (M, M), differentiable: a node's correlation with itself is the constant one."""
    sigma = theta = h_s @ h_s.T
    scale = torch.outer(h_s.norm(dim=1), h_s.norm(dim=1))
    itself = torch.eye(len(h_s), dtype=torch.bool)
    for _ in range(hops * layers):
        k0, k1 = arc_cosine(torch.where(itself, 1.0, (sigma / scale).clamp(-1, 1)))
        sigma = k1 * scale
        theta = theta * k0 + sigma
    return theta


def krr_loss(k_ss, k_ts, y_s, targets, ridge, kind, log_temperature):
    """The outer objective on the rows of ``k_ts``, as one differentiable expression. ``targets``: labels (rows,), or
    class probabilities (rows, C)."""
    m, num_classes = y_s.shape
    a = k_ss + ridge * k_ss.trace() / m * torch.eye(m, dtype=k_ss.dtype)
    scores = k_ts @ torch.linalg.solve(a, y_s)
    if kind == "mse":
        wanted = targets if targets.ndim == 2 else one_hot(targets, num_classes)
        return (scores - wanted).square().mean()
    return cross_entropy(scores * log_temperature.exp(), targets)


def directional_difference(function, point, direction, step=1e-5):
    """(f(x + s v) - f(x - s v)) / 2s for a scalar function."""
    return (function(point + step * direction) - function(point - step * direction)) / (2 * step)


def student(model, x, a):
    """Logits (N, C) of a trained student on features x (N, d) and adjacency a (N, N), from its weights."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    kind, weighed = model.config.kind, model.config.propagation
    p = propagation(a, ("mean" if kind == "sage" else "sym") if weighed == "auto" else weighed)

    def linear(name, value):
        value = value @ weights[f"{name}.weight"].T
        return value + weights[f"{name}.bias"] if f"{name}.bias" in weights else value

    def attention(index, value):
        layer, own = f"layers.{index}", weights[f"layers.{index}.att_src"]
        heads, width = own.shape[1:]
        value = linear(f"{layer}.lin", value).view(-1, heads, width)
        source, target = ((value * weights[f"{layer}.att_{end}"]).sum(2) for end in ("src", "dst"))
        score = leaky_relu(target[:, None] + source[None], 0.2).masked_fill(a[:, :, None] == 0, -math.inf)
        mixed = torch.einsum("ijh,jhw->ihw", score.softmax(1), value)
        return mixed.flatten(1) + weights[f"{layer}.bias"]

    if kind == "sgc":
        return linear("layers.0", torch.linalg.matrix_power(p, model.config.depth) @ x)
    if kind == "appnp":
        x = root = linear("layers.1", linear("layers.0", x).relu())
        for _ in range(10):
            x = 0.9 * p @ x + 0.1 * root
        return x
    for index in range(model.config.depth):
        layer = f"layers.{index}"
        if kind == "gcn":
            x = linear(layer, p @ x)
        elif kind == "sage":
            x = linear(f"{layer}.0", p @ x) + linear(f"{layer}.1", x)
        else:
            x = attention(index, x)
        if index < model.config.depth - 1:
            x = elu(x) if kind == "gat" else x.relu()
    return x
