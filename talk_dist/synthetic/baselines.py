"""What other methods make of the same graph: class centres, GCond-X, ClustGDD, GC-SNTK; at the level of encodings.

All return M encodings and labels (one-hot but for GC-SNTK, which learns them), class by class, for synthetic nodes
that only see themselves. They read the propagated encodings P^2 H of a sample of training rows alone, so that a
linear model on these rows is an SGC on the real graph, and a student on a synthetic node is a perceptron. No global
random state is touched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, softmax

from talk_dist.kernel.sntk import TINY
from talk_dist.runtime.pool import TrainSample
from talk_dist.synthetic.coresets import class_centres, select
from talk_dist.synthetic.init import one_hot_labels


def row_size(features: np.ndarray) -> float:
    """Root mean square norm of the rows (n, d): learning rates are for rows of norm one, whatever the encoder."""
    return float(np.sqrt(np.square(features, dtype=np.float64).sum(1).mean()))


def centres(sample: TrainSample, counts: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """k-means centres of every class: encodings (M, d) and labels (M, C) for ``counts`` (C,)."""
    return torch.from_numpy(class_centres(sample, counts, seed)), one_hot_labels(counts)


# -- gradient matching ------------------------------------------------------------------------------------


def class_gradients(weight: Tensor, h: Tensor, counts: np.ndarray) -> Tensor:
    """Gradients (C, C, d) of a linear model (C, d): those of the mean cross-entropy of each class's rows.

    ``h`` (n, d) has ``counts`` (C,) rows of each class, class by class.
    """
    error = softmax(h @ weight.T, 1) - one_hot_labels(counts)
    classes = zip(error.split(counts.tolist()), h.split(counts.tolist()), strict=True)
    return torch.stack([e.T @ x / len(x) for e, x in classes])


def matching_distance(real: Tensor, synthetic: Tensor, share: Tensor) -> Tensor:
    """One minus the cosine, summed over the model's outputs and, weighted by ``share`` (C,), over the classes.

    Both gradients are (C, C, d): class of the rows, output, input.
    """
    return ((1 - cosine_similarity(real, synthetic, dim=2)).sum(1) * share).sum()


def gcond_x(
    sample: TrainSample,
    counts: np.ndarray,
    seed: int,
    *,
    models: int = 20,
    steps: int = 50,
    model_steps: int = 1,
    feature_lr: float = 0.05,
    model_lr: float = 0.02,
    batch: int = 256,
) -> tuple[Tensor, Tensor]:
    """GCond without a structure, A = I (Jin et al., Graph condensation for graph neural networks, ICLR 2022).

    Encodings (M, d) start as real rows. For each of ``models`` randomly initialised SGCs they take ``steps``
    Adam steps that match its class-wise gradients, the SGC training for ``model_steps`` on them after each.
    A class gives at most ``batch`` real rows a step. Simplified: the last encodings are kept, where the paper
    keeps those that validate best. Returns them with labels (M, C).
    """
    generator, y_s, size = torch.Generator().manual_seed(seed), one_hot_labels(counts), row_size(sample.features)
    features = torch.from_numpy(sample.features).float() / size
    h_s = features[torch.from_numpy(select(sample, counts, "random", seed))].requires_grad_()
    of_class = np.bincount(sample.label, minlength=len(counts))
    rows = torch.arange(len(features)).split(of_class.tolist())
    share = torch.from_numpy(of_class / of_class.max()).float()
    shape, bound = (len(counts), features.shape[1]), features.shape[1] ** -0.5
    optimizer = torch.optim.Adam([h_s], lr=feature_lr * bound)
    for _ in range(models):
        weight = torch.empty(shape).uniform_(-bound, bound, generator=generator).requires_grad_()
        model_optimizer = torch.optim.Adam([weight], lr=model_lr)
        for _ in range(steps):
            drawn = torch.cat([r[torch.randperm(len(r), generator=generator)[:batch]] for r in rows])
            real = class_gradients(weight.detach(), features[drawn], np.minimum(of_class, batch))
            optimizer.zero_grad()
            matching_distance(real, class_gradients(weight.detach(), h_s, counts), share).backward()
            optimizer.step()
            for _ in range(model_steps):
                model_optimizer.zero_grad()
                cross_entropy(h_s.detach() @ weight.T, y_s).backward()
                model_optimizer.step()
    return h_s.detach() * size, y_s


# -- clustering and refinement ----------------------------------------------------------------------------


def teacher_weights(features: Tensor, label: Tensor, num_classes: int, steps: int, lr: float) -> Tensor:
    """A linear model (C, d) of the labels (n,) of rows (n, d): ``steps`` of Adam on the cross-entropy, from zero."""
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(features @ weight.T, label).backward()
        optimizer.step()
    return weight.detach()


def cluster_view(features: Tensor, start: Tensor, probability: Tensor) -> Tensor:
    """Mean probabilities (m, C) of the rows (n, d) of one class that are nearest to each of its centres (m, d)."""
    distance = torch.cdist(features, start)
    member = distance == distance.amin(1, keepdim=True)
    member |= ~member.any(0) & (distance == distance.amin(0))  # a centre without rows takes the nearest one's view
    return member.to(probability).T @ probability / member.sum(0)[:, None]


def refinement_loss(
    h_s: Tensor, start: Tensor, y_s: Tensor, view: Tensor, teacher: Tensor, consistency: float, proximity: float
) -> Tensor:
    """Cross-entropy of the teacher (C, d) on (M, d), its distance to the view (M, C), and that to the start."""
    logits = h_s @ teacher.T
    loss = cross_entropy(logits, y_s) + consistency * (softmax(logits, 1) - view).pow(2).sum(1).mean()
    return loss + proximity * (h_s - start).pow(2).sum(1).mean()


def clust_gdd(
    sample: TrainSample,
    counts: np.ndarray,
    seed: int,
    *,
    steps: int = 200,
    feature_lr: float = 0.01,
    consistency: float = 0.3,
    proximity: float = 0.3,
    teacher_steps: int = 200,
    teacher_lr: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """ClustGDD (Lai et al., Simple yet effective graph distillation via clustering, KDD 2025).

    k-means centres, refined by Adam: a teacher trained on the real rows should see in a centre its class (the
    class-aware view) and about what it sees in the members of its cluster (the cluster view, consistency).
    Simplified: A_s = I, so there is no adjacency, of the clusters or sampled by class; clusters are made within
    classes, not over the graph by homophily; the teacher is linear; a proximity term keeps the change small.
    Returns encodings (M, d) and labels (M, C).
    """
    size, y_s = row_size(sample.features), one_hot_labels(counts)
    features, label = torch.from_numpy(sample.features).float() / size, torch.from_numpy(sample.label).long()
    start = torch.from_numpy(class_centres(sample, counts, seed)) / size
    teacher = teacher_weights(features, label, len(counts), teacher_steps, teacher_lr)
    of_class = torch.bincount(label).tolist()
    parts = features.split(of_class), start.split(counts.tolist()), softmax(features @ teacher.T, 1).split(of_class)
    view = torch.cat([cluster_view(*part) for part in zip(*parts, strict=True)])
    h_s = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([h_s], lr=feature_lr / features.shape[1] ** 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        refinement_loss(h_s, start, y_s, view, teacher, consistency, proximity).backward()
        optimizer.step()
    return h_s.detach() * size, y_s


# -- kernel ridge regression ------------------------------------------------------------------------------


def tangent_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Neural tangent kernel (n, m) of a perceptron with one hidden layer of ReLUs, of rows (n, d) and (m, d): the
    structure-based one, if they are propagated."""
    size = x.norm(dim=1)[:, None] * y.norm(dim=1)
    edge = 1 - 1e-14  # at one the arc cosine's slope is infinite
    cosine = (x @ y.T / size.clamp_min(TINY)).clamp(-edge, edge)  # a row may be zero
    angle = torch.acos(cosine)
    return size * (2 * cosine * (torch.pi - angle) + torch.sin(angle)) / torch.pi


def gc_sntk(
    sample: TrainSample,
    counts: np.ndarray,
    seed: int,
    *,
    steps: int = 200,
    feature_lr: float = 0.01,
    label_lr: float = 0.01,
    ridge: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """GC-SNTK (Wang et al., Fast graph condensation with structure-based neural tangent kernel, WWW 2024).

    Encodings, which start as real rows, and labels of which kernel ridge regression predicts the labels of the real
    rows, by Adam on the mean square error; no student is trained. ``ridge`` is relative to the mean of the kernel's
    diagonal. Simplified: A_s = I, one layer, the last step is kept. Returns encodings (M, d) and labels (M, C).
    """
    size = row_size(sample.features)
    features = torch.from_numpy(sample.features).double() / size
    targets = torch.eye(len(counts), dtype=torch.float64)[torch.from_numpy(sample.label).long()]
    h_s = features[torch.from_numpy(select(sample, counts, "random", seed))].requires_grad_()
    y_s = one_hot_labels(counts).double().requires_grad_()
    rates = (h_s, feature_lr * features.shape[1] ** -0.5), (y_s, label_lr)
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in rates])
    for _ in range(steps):
        k_ss = tangent_kernel(h_s, h_s)
        k_ss = k_ss + ridge * k_ss.diagonal().mean() * torch.eye(len(k_ss), dtype=torch.float64)
        optimizer.zero_grad()
        (tangent_kernel(features, h_s) @ torch.linalg.solve(k_ss, y_s) - targets).pow(2).mean().backward()
        optimizer.step()
    return (h_s.detach() * size).float(), y_s.detach().float()


FEATURE_LEVEL: dict[str, Callable[[TrainSample, np.ndarray, int], tuple[Tensor, Tensor]]] = {
    "centres": centres,
    "gcond-x": gcond_x,
    "clust-gdd": clust_gdd,
    "gc-sntk": gc_sntk,
}
