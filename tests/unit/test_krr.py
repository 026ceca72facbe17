"""Kernel ridge regression: against scikit-learn, and its hand-made gradient against autograd."""

import warnings

import numpy as np
import pytest
import reference
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import f1_score
from torch.nn.functional import one_hot

from talk_dist.errors import NotPSDError
from talk_dist.kernel import krr
from talk_dist.kernel.krr import complete_gradient, dual_coefficients, loss_scale, loss_sums, ridge_path
from talk_dist.kernel.sntk import synthetic_block, synthetic_kernel
from talk_dist.runtime.outer import accuracy, macro_f1

M, C, ROWS = 7, 3, 20


@pytest.fixture
def problem():
    """h_s (M, d), y_s (M, C), a constant matrix that stands for K_ts (ROWS, M), and labels (ROWS,)."""
    rng = np.random.default_rng(3)
    h_s, y_s, k_ts = (torch.from_numpy(rng.normal(size=shape)) for shape in [(M, 5), (M, C), (ROWS, M)])
    return h_s, y_s, k_ts, torch.from_numpy(rng.integers(0, C, ROWS))


@pytest.mark.parametrize("ridge", [1e-5, 1e-3, 0.5])
def test_dual_is_that_of_scikit_learn(problem, ridge):
    """KernelRidge(kernel="precomputed") with alpha = ridge * trace(K)/M: the ridge is relative."""
    h_s, y_s, k_ts, _ = problem
    k_ss = synthetic_kernel(h_s, 2)
    model = KernelRidge(kernel="precomputed", alpha=ridge * float(k_ss.trace()) / M).fit(k_ss.numpy(), y_s.numpy())
    solution = dual_coefficients(k_ss, y_s, ridge)
    np.testing.assert_allclose(solution.dual, model.dual_coef_, rtol=1e-9)
    np.testing.assert_allclose(k_ts @ solution.dual, model.predict(k_ts.numpy()), rtol=1e-8, atol=1e-10)


def test_the_solve_is_in_float64(problem):
    """Single precision input is solved in double precision."""
    h_s, y_s, _, _ = problem
    k_ss = synthetic_kernel(h_s, 2).float()
    solution = dual_coefficients(k_ss, y_s.float(), 1e-5)
    assert solution.dual.dtype == torch.float64
    a = k_ss.double() + 1e-5 * k_ss.double().trace() / M * torch.eye(M, dtype=torch.float64)
    torch.testing.assert_close(a @ solution.dual, y_s.float().double(), rtol=1e-9, atol=1e-10)


def indefinite(lowest):
    """A symmetric matrix of mean diagonal 1, up to rounding, with the smallest eigenvalue ``lowest``."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(M, M)))
    values = np.array([lowest, *np.linspace(1.0, 1.3, M - 1)])
    return torch.from_numpy((basis * (values / values.mean())) @ basis.T)


@pytest.mark.parametrize(("lowest", "jitter"), [(-1e-9, 1e-8), (-3e-7, 1e-6), (-5e-5, 1e-4)])
def test_jitter_escalates_with_a_warning_that_names_it(problem, lowest, jitter):
    """The smallest jitter that suffices is taken, named, and is what the dual coefficients solve for."""
    k, y_s = indefinite(lowest), problem[1]
    with pytest.warns(UserWarning, match=f"jitter of {jitter:g}"):
        solution = dual_coefficients(k, y_s, 0.0)
    a = k + jitter * k.diagonal().mean() * torch.eye(M, dtype=torch.float64)
    torch.testing.assert_close(solution.dual, torch.linalg.solve(a, y_s), rtol=1e-4, atol=0)
    torch.testing.assert_close(solution.factor @ solution.factor.T, a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual_coefficients(k, y_s, 1e-3)  # the ridge alone suffices: no jitter, no warning


@pytest.mark.parametrize("broken", [indefinite(-1e-2), torch.full((M, M), float("nan"), dtype=torch.float64)])
def test_a_hopeless_kernel_is_an_error_that_names_jitter_and_remedy(problem, broken):
    """Indefinite beyond the largest jitter, or not finite."""
    with pytest.raises(
        NotPSDError, match=r"7 synthetic nodes .* ridge 0\.001 and jitter 0\.0001 .* raise kernel.ridge"
    ):
        dual_coefficients(broken, problem[1], 1e-3)


@pytest.mark.parametrize("log_temperature", [0.0, 1.3, -0.7])
@pytest.mark.parametrize("kind", ["mse", "ce"])
def test_loss_sums_and_their_derivatives_are_autograd(problem, kind, log_temperature):
    """Loss, dL/dF and dL/dlog_temperature; divided by the scale they are the mean loss of the method."""
    _, _, k_ts, labels = problem
    scores = k_ts[:, :C].clone().requires_grad_()
    log_t = torch.tensor(log_temperature, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(C, dtype=torch.float64)  # K_ss = A = I and K_ts = F make the reference a plain loss of F
    truth = reference.krr_loss(eye, scores, eye, labels, 0.0, kind, log_t)
    d_scores, d_log_t = torch.autograd.grad(truth, [scores, log_t], materialize_grads=True)
    sums, scale = loss_sums(scores.detach(), one_hot(labels, C), kind, log_temperature), loss_scale(kind, ROWS, C)
    for mine, theirs in zip(
        (sums.loss, sums.d_scores, sums.d_log_temperature), (truth, d_scores, d_log_t), strict=True
    ):
        torch.testing.assert_close(scale * mine, theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("jitter", [0.0, 0.05])
@pytest.mark.parametrize("layers", [1, 2])
def test_completed_gradient_is_autograd_through_the_solve(problem, monkeypatch, layers, jitter):
    """From dL/dB and the part through K_ts; a jitter that was needed is part of what is differentiated."""
    h_s, y_s, k_ts, labels = problem
    ridge, hops = 1e-2, 2
    h, y = h_s.clone().requires_grad_(), y_s.clone().requires_grad_()
    truth = reference.krr_loss(
        reference.kernel_ss(h, hops, layers), k_ts @ h.tanh() @ h.T, y, labels, ridge + jitter, "mse", torch.zeros(())
    )
    expected = torch.autograd.grad(truth, [h, y])

    monkeypatch.setattr(krr, "JITTERS", (jitter,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = dual_coefficients(synthetic_kernel(h_s, hops, layers), y_s, ridge)
    leaf = h_s.clone().requires_grad_()
    block = k_ts @ leaf.tanh() @ leaf.T  # any function of h_s serves as K_ts here
    sums = loss_sums(block.detach() @ solution.dual, one_hot(labels, C), "mse")
    d_scores = loss_scale("mse", ROWS, C) * sums.d_scores
    (through_block,) = torch.autograd.grad(block, leaf, d_scores @ solution.dual.T)
    kernel = synthetic_block(h_s, hops, layers)
    mine = complete_gradient(h_s, kernel, solution, block.detach().T @ d_scores, through_block)
    for gradient, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-7, atol=1e-9)


def test_macro_f1_is_that_of_scikit_learn():
    """From counts; classes that are neither true nor predicted do not count."""
    true, predicted = np.array([0, 0, 1, 1, 1, 3, 3]), np.array([0, 1, 1, 1, 0, 3, 0])
    counts = np.zeros((5, 5), np.int64)
    np.add.at(counts, (true, predicted), 1)
    assert macro_f1(counts) == pytest.approx(f1_score(true, predicted, average="macro"))
    assert macro_f1(0 * counts) == accuracy(0 * counts) == 0.0


def test_the_ridge_path_is_the_solution_at_every_ridge(problem):
    h_s, y_s, _, _ = problem
    k_ss = synthetic_kernel(h_s, 2, 1)
    ridges = [1e-3, 0.1, 10.0]
    for ridge, dual in zip(ridges, ridge_path(k_ss, y_s, ridges), strict=True):
        torch.testing.assert_close(dual, dual_coefficients(k_ss, y_s, ridge).dual, rtol=1e-9, atol=1e-11)


def test_a_zero_ridge_on_a_singular_kernel_is_refused():
    with pytest.raises(NotPSDError, match="zero"):
        ridge_path(torch.ones(3, 3), torch.eye(3), [0.0, 0.1])
