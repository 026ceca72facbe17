"""Inversion: exact on problems whose answer is known, each node by itself, never farther than it began."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from talk_dist.config import DistillConfig, SyntheticConfig
from talk_dist.data.tag import TokenLists
from talk_dist.synthetic.init import fit_texts
from talk_dist.synthetic.invert import invert


def linear(nodes=4, wanted=3, unknown=12, seed=0):
    """x -> A_i x_i with fewer equations than unknowns, ill-conditioned: (A, targets, residual)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(nodes, wanted, unknown, generator=generator, dtype=torch.float64)
    a = a * torch.tensor([1.0, 0.3, 0.1]).double()[:wanted, None]
    target = torch.randn(nodes, wanted, generator=generator, dtype=torch.float64)

    def residual(x, nodes=slice(None)):
        error = (a[nodes] @ x[..., None])[..., 0] - target[nodes]
        return error.square().sum(1), 2 * (a[nodes].mT @ error[..., None])[..., 0]

    return a, target, residual


def test_a_linear_problem_is_solved_by_the_nearest_solution():
    """From zero, gradients stay in the row space: the limit is the pseudo-inverse's."""
    a, target, residual = linear()
    found = invert(residual, torch.zeros(4, 12).double(), 60, torch.zeros(4).double(), lambda *_: None)
    expected = (torch.linalg.pinv(a) @ target[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_it_takes_far_fewer_passes_than_gradient_descent():
    _, _, residual = linear()
    found = invert(residual, torch.zeros(4, 12).double(), 25, torch.zeros(4).double(), lambda *_: None)
    x = torch.zeros(4, 12).double()
    for _ in range(250):  # with Polyak's step length
        loss, gradient = residual(x)
        x = x - (loss / gradient.square().sum(1).clamp_min(1e-30))[:, None] * gradient
    assert residual(found)[0].max() < 1e-3 * residual(x)[0].max()


def test_what_a_node_becomes_does_not_depend_on_the_others():
    _, _, residual = linear()
    start = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).double()

    goal, asked = torch.tensor([1e-1, 1e-6, 1e-2, 1e-3]).double(), []

    def counted(x, nodes):
        asked.append(len(nodes))
        return residual(x, nodes)

    found = invert(counted, start, 40, goal, lambda *_: None)
    for node in range(4):
        alone = invert(lambda x, _, node=node: residual(x, [node]), start[[node]], 40, goal[[node]], lambda *_: None)
        torch.testing.assert_close(found[[node]], alone)
    assert asked == sorted(asked, reverse=True)
    assert set(asked) > {1, 4}  # who has reached his goal is not asked again


def test_no_node_ends_farther_than_it_began():
    """On a function that no quadratic describes."""

    def residual(x, _=None):
        leaf = x.detach().requires_grad_()
        loss = (torch.sin(9 * leaf).sum(1) - 0.3).square() + leaf.abs().sum(1)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    start, told = torch.randn(30, 5, generator=torch.Generator().manual_seed(2)), []
    found = invert(residual, start, 40, torch.zeros(30), lambda step, loss: told.append(loss))
    assert bool((residual(found)[0] <= residual(start)[0]).all())
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(told))


def test_it_stops_at_the_goal():
    _, _, residual = linear()
    told, goal = [], torch.full((4,), 1e-3).double()
    found = invert(residual, torch.zeros(4, 12).double(), 500, goal, lambda step, loss: told.append(step))
    assert bool((residual(found)[0] <= goal).all())
    assert told[-1] == 500  # the progress line ends
    assert len(told) < 60


@pytest.mark.parametrize("together", [2, 512])
def test_tokens_that_produce_given_encodings(make_encoder, monkeypatch, together):
    """Of real texts' length, in pieces or all at once."""
    from talk_dist.synthetic import init

    monkeypatch.setattr(init, "TOGETHER", together)
    encoder, generator = make_encoder(), torch.Generator().manual_seed(3)
    texts = TokenLists(np.arange(0, 31, 6), torch.randint(5, 40, (30,), generator=generator).int().numpy())
    wanted = encoder.encode_embeds(torch.randn(5, 6, 32, generator=generator))
    config, reports, saved = DistillConfig(synthetic=SyntheticConfig(tokens=6)), [], []
    found = fit_texts(encoder, texts, wanted, config, lambda *report: reports.append(report), save=saved.append)
    assert [len(x_s) for x_s in saved] == ([2, 4, 5] if together == 2 else [5])
    for done in saved:
        again = fit_texts(encoder, texts, wanted, config, lambda *_: None, done)
        assert again.equal(found)
    error = (encoder.encode_embeds(found) - wanted).square().sum(1) / wanted.square().sum(1)
    assert error.max() <= config.two_stage.token_error
    assert reports[-1][1] == reports[-1][2]
