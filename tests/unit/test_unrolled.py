"""Back through a student's training: against autograd through the same passes, and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from talk_dist.models import unrolled
from talk_dist.models.gnn import Student, local_graph
from talk_dist.models.inner import soft_labels
from talk_dist.models.unrolled import Unrolled
from talk_dist.training import InnerConfig, StudentConfig, StudentKind

KINDS: tuple[StudentKind, ...] = ("gcn", "sage", "sgc", "appnp", "gat")
M, WIDTH, CLASSES, PASSES = 7, 5, 3, 9
RECIPE = InnerConfig(passes=PASSES, gnn_lr=0.02, weight_decay=0.01, target_loss=0.0, patience=PASSES)


def student_of(kind: StudentKind, dropout: float = 0.0) -> Student:
    return Student(StudentConfig(kind=kind, hidden=8, dropout=dropout), WIDTH, CLASSES, seed=3).double()


@pytest.fixture
def small_set() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encodings and labels; real features and classes that a trained student is scored on."""
    generator = torch.Generator().manual_seed(5)
    h_s = torch.randn(M, WIDTH, generator=generator, dtype=torch.float64)
    y_s = torch.rand(M, CLASSES, generator=generator)
    real = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    return h_s, y_s, real, torch.randint(CLASSES, (40,), generator=generator)


def through_autograd(student: Student, h_s: torch.Tensor, y_s: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """The slow reference: one graph of all passes, AdamW written out tensor by tensor."""
    weights = {name: value.detach().requires_grad_() for name, value in student.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for index in range(1, PASSES + 1):
        torch.manual_seed(seed + index)
        loss = cross_entropy(functional_call(student, weights, (h_s,)), soft_labels(y_s).double())
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        for name, g in zip(list(weights), gradients, strict=True):
            first[name] = unrolled.BETA_1 * first[name] + (1 - unrolled.BETA_1) * g
            second[name] = unrolled.BETA_2 * second[name] + (1 - unrolled.BETA_2) * g**2
            root = (second[name] / (1 - unrolled.BETA_2**index) + 1e-60).sqrt()  # has a slope where nothing flows
            step = first[name] / (1 - unrolled.BETA_1**index) / (root + unrolled.EPSILON)
            weights[name] = weights[name] * (1 - RECIPE.gnn_lr * RECIPE.weight_decay) - RECIPE.gnn_lr * step
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adjoint_is_autograd_through_all_passes(kind, dropout, small_set):
    h_s, y_s, real, labels = small_set
    student = student_of(kind, dropout).train()
    leaf = h_s.clone().requires_grad_()
    expected = through_autograd(student, leaf, y_s, seed=11)

    def score(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(functional_call(student.eval(), weights, (real,)), labels)

    (wanted,) = torch.autograd.grad(score(expected), leaf)
    trained = Unrolled(student, h_s, y_s, RECIPE, PASSES, seed=11)
    weights = {name: value.detach().requires_grad_() for name, value in trained.weights.items()}
    gradients = torch.autograd.grad(score(weights), list(weights.values()), materialize_grads=True)
    d_weights = dict(zip(weights, gradients, strict=True))
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trained.pull(d_weights), wanted, rtol=1e-6, atol=1e-9)
    assert wanted.norm() > 1e-4


def test_passes_are_those_of_adamw(small_set, monkeypatch):
    h_s, y_s, _, _ = small_set
    monkeypatch.setattr(unrolled, "EPSILON", 1e-8)
    student = student_of("gcn")
    ours = Unrolled(student, h_s, y_s, RECIPE, PASSES, seed=0).weights
    optimizer = torch.optim.AdamW(student.parameters(), lr=RECIPE.gnn_lr, weight_decay=RECIPE.weight_decay)
    for _ in range(PASSES):
        optimizer.zero_grad()
        cross_entropy(student(h_s), soft_labels(y_s).double()).backward()
        optimizer.step()
    for name, value in student.named_parameters():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_is_a_graph_of_self_loops(kind):
    x, nodes = torch.randn(M, WIDTH), np.arange(M + 1)
    student = Student(StudentConfig(kind=kind, hidden=8), WIDTH, CLASSES, seed=0).eval()
    loops = local_graph(student.config, nodes, nodes[:-1], np.ones(M, np.int64))
    torch.testing.assert_close(student(x), student(x, loops), rtol=1e-5, atol=1e-6)
