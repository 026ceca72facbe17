"""Baselines at the level of encodings against formulas written out, and that they improve on where they start."""

from functools import partial

import numpy as np
import pytest
import reference
import torch
from torch.nn.functional import cross_entropy, one_hot

from talk_dist.runtime.pool import TrainSample
from talk_dist.synthetic.baselines import (
    FEATURE_LEVEL,
    class_gradients,
    clust_gdd,
    cluster_view,
    gc_sntk,
    gcond_x,
    matching_distance,
    refinement_loss,
    row_size,
    tangent_kernel,
    teacher_weights,
)
from talk_dist.synthetic.coresets import class_centres, select

COUNTS = np.array([3, 1, 2])
METHODS = FEATURE_LEVEL | {"gcond-x": partial(gcond_x, models=4)}  # of twenty, each as long as any


def mixture(seed=0, per_class=(60, 20, 40), width=12, spread=1.4):
    """Three overlapping Gaussians around the same fixed points, class by class."""
    middle = np.random.default_rng(5).normal(size=(3, width)) + 0.5
    label = np.repeat(np.arange(3), per_class).astype(np.int32)
    noise = np.random.default_rng(seed).normal(size=(len(label), width))
    features = (middle[label] + spread * noise).astype(np.float32)
    return TrainSample(label, features, np.zeros((len(label), 2), np.int64))


def scaled(sample, factor):
    return TrainSample(sample.label, sample.features * np.float32(factor), sample.place)


# -- every baseline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_nodes_come_class_by_class_with_their_labels(name):
    """As many as asked of each class, near that class; float32, finite, and not bound to a graph of gradients."""
    sample = mixture(spread=0.1)
    h_s, y_s = METHODS[name](sample, COUNTS, 0)
    assert (h_s.shape, y_s.shape) == ((6, 12), (6, 3))
    assert h_s.dtype == y_s.dtype == torch.float32
    assert not h_s.requires_grad
    assert torch.isfinite(h_s).all()
    np.testing.assert_array_equal(y_s if name != "gc-sntk" else y_s.round(), np.eye(3)[[0, 0, 0, 1, 2, 2]])
    middle = torch.from_numpy(np.stack([sample.features[sample.label == k].mean(0) for k in range(3)]))
    cosine = torch.nn.functional.cosine_similarity(h_s[:, None], middle[None], dim=2)
    assert torch.equal(cosine.argmax(1), y_s.argmax(1))


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_gives_the_same_and_disturbs_nothing(name):
    """Twice the same bits, neither the sample nor any global random state touched; another seed, another result."""
    sample, torch_state, numpy_state = mixture(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    before = sample.features.copy()
    first, again, other = (METHODS[name](sample, COUNTS, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "gc-sntk")  # whose only draw is that of the sample
    np.testing.assert_array_equal(sample.features, before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_the_encodings_does_not_matter(name):
    """Those of an encoder that is 16 times as loud give 16 times the result: rates are relative."""
    sample = mixture()
    small, large = (METHODS[name](s, COUNTS, 0)[0] for s in (sample, scaled(sample, 16)))
    torch.testing.assert_close(16 * small, large, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("name", METHODS)
def test_a_class_with_fewer_rows_than_nodes_is_no_trouble(name):
    """Two rows for four nodes, one row repeated: nothing is divided by zero."""
    sample = mixture(per_class=(30, 2, 30))
    sample.features[32:] = sample.features[32]
    h_s, y_s = METHODS[name](sample, np.array([2, 4, 3]), 0)
    assert torch.isfinite(h_s).all()
    assert torch.isfinite(y_s).all()
    if name != "gc-sntk":
        np.testing.assert_array_equal(y_s.sum(0), [2, 4, 3])


def test_centres_do_not_depend_on_the_order_within_a_class():
    """Of clear clusters, the same set of centres."""
    rng = np.random.default_rng(0)
    corners = rng.normal(size=(6, 12)) * 10
    label, corner = np.repeat(np.arange(3), [60, 20, 40]).astype(np.int32), np.repeat(np.arange(6), 20)
    features = (corners[corner] + 0.1 * rng.normal(size=(120, 12))).astype(np.float32)
    order = np.lexsort((rng.permutation(120), label))
    found = []
    for x in (features, features[order]):
        h_s, _ = FEATURE_LEVEL["centres"](TrainSample(label, x, np.zeros((120, 2), np.int64)), COUNTS, 0)
        found.append(np.concatenate([part[np.argsort(part[:, 0])] for part in np.split(h_s.numpy(), [3, 4])]))
    np.testing.assert_allclose(*found, atol=1e-5)


# -- gradient matching ------------------------------------------------------------------------------------


def test_class_gradients_are_those_of_the_cross_entropy():
    """Against autograd, and against (p_j - [j = class]) x averaged in plain loops."""
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 3))
    weight.requires_grad_()
    mine = class_gradients(weight, h, COUNTS).detach()
    assert mine.shape == (3, 3, 5)
    for k, rows in enumerate(h.split(COUNTS.tolist())):
        loss = cross_entropy(rows @ weight.T, torch.full((len(rows),), k))
        torch.testing.assert_close(mine[k], torch.autograd.grad(loss, weight)[0])
        by_hand = np.zeros((3, 5))
        for x in rows.numpy():
            score = np.exp(weight.detach().numpy() @ x)
            for j in range(3):
                by_hand[j] += (score[j] / score.sum() - (j == k)) * x / len(rows)
        np.testing.assert_allclose(mine[k], by_hand)


def test_the_distance_is_a_sum_of_cosines():
    """Zero for the same directions whatever their length, two for an opposite one; a class counts by its share."""
    generator = torch.Generator().manual_seed(0)
    real, other = (torch.randn(3, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    share = torch.tensor([1.0, 0.25, 0.5], dtype=torch.float64)
    length = torch.rand(3, 3, 1, generator=generator, dtype=torch.float64) + 0.1
    assert float(matching_distance(real, length * real, share)) == pytest.approx(0, abs=1e-12)
    one_turned = real.clone()
    one_turned[1, 2] *= -1
    assert float(matching_distance(real, one_turned, share)) == pytest.approx(2 * 0.25)
    expected = 0.0
    for k in range(3):
        for a, b in zip(real[k].numpy(), other[k].numpy(), strict=True):
            expected += float(share[k]) * (1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert float(matching_distance(real, other, share)) == pytest.approx(expected)


def mean_distance(sample, h_s):
    """The mean distance over fresh linear models, of all rows of the sample to the synthetic ones."""
    generator, size = torch.Generator().manual_seed(99), row_size(sample.features)
    features, of_class = torch.from_numpy(sample.features) / size, np.bincount(sample.label)
    weights = torch.randn(20, 3, 12, generator=generator) / 12**0.5
    distances = [
        matching_distance(class_gradients(w, features, of_class), class_gradients(w, h_s / size, COUNTS), torch.ones(3))
        for w in weights
    ]
    return float(torch.stack(distances).mean())


def held_out_accuracy(h_s, y_s):
    """Of a linear model trained on the synthetic nodes, on fresh points of the same mixture."""
    weight = teacher_weights(h_s / row_size(h_s.numpy()), y_s.argmax(1), 3, 200, 0.02)
    fresh = mixture(seed=1, per_class=(400, 400, 400))
    return ((torch.from_numpy(fresh.features) @ weight.T).argmax(1).numpy() == fresh.label).mean()


def test_matching_gradients_beats_the_real_rows_it_starts_from():
    """The gradients of models never seen come nearer, and a linear model classifies unseen points better."""
    sample = mixture()
    start = torch.from_numpy(sample.features[select(sample, COUNTS, "random", 0)])
    untouched, y_s = gcond_x(sample, COUNTS, 0, models=0)
    torch.testing.assert_close(untouched, start)
    h_s, _ = gcond_x(sample, COUNTS, 0)
    assert mean_distance(sample, h_s) < 0.2 * mean_distance(sample, start)
    assert held_out_accuracy(h_s, y_s) > held_out_accuracy(start, y_s) + 0.05


def test_only_so_many_real_rows_are_drawn():
    """A batch of all rows is the same as more than all; a batch of one row is not."""
    sample = mixture()
    all_rows, more, one = (gcond_x(sample, COUNTS, 0, models=1, batch=batch)[0] for batch in (60, 10_000, 1))
    assert torch.equal(all_rows, more)
    assert not torch.allclose(all_rows, one, atol=1e-3)


# -- clustering and refinement ----------------------------------------------------------------------------


def test_a_cluster_view_is_the_mean_of_the_members():
    """Of the rows nearest to a centre, by brute force; a centre that repeats another, or has no rows, has one too."""
    rng = np.random.default_rng(0)
    features, start = (torch.from_numpy(rng.normal(size=(n, 4))) for n in (30, 3))
    probability = torch.from_numpy(rng.dirichlet(np.ones(3), 30))
    mine = cluster_view(features, start, probability)
    nearest = [int(np.linalg.norm(start.numpy() - x, axis=1).argmin()) for x in features.numpy()]
    expected = [probability[[n == m for n in nearest]].mean(0) for m in range(3)]
    torch.testing.assert_close(mine, torch.stack(expected))
    twice = cluster_view(features, start[[0, 1, 2, 0]], probability)
    torch.testing.assert_close(twice, mine[[0, 1, 2, 0]])
    far_away = torch.full((1, 4), 50.0, dtype=torch.float64)
    alone = cluster_view(features, torch.cat([start, far_away]), probability)[3]
    torch.testing.assert_close(alone, probability[torch.cdist(far_away, features).argmin()])


def test_the_teacher_is_a_softmax_regression():
    """No steps: no opinion; many steps: where the gradient of the cross-entropy vanishes."""
    sample = mixture()
    features, label = torch.from_numpy(sample.features), torch.from_numpy(sample.label).long()
    assert not teacher_weights(features, label, 3, 0, 0.02).any()
    weight = teacher_weights(features, label, 3, 3000, 0.02)
    gradient = (torch.softmax(features @ weight.T, 1) - one_hot(label, 3)).T @ features / len(label)
    assert gradient.norm() < 1e-3
    assert weight.norm() > 1


def test_refinement_lowers_its_objective_and_stays_near_the_centres():
    """Each term is its formula; the result is better than the centres, more so on a longer leash."""
    sample, size = mixture(), row_size(mixture().features)
    features, label = torch.from_numpy(sample.features) / size, torch.from_numpy(sample.label).long()
    start, y_s = torch.from_numpy(class_centres(sample, COUNTS, 0)) / size, torch.eye(3)[[0, 0, 0, 1, 2, 2]]
    teacher = teacher_weights(features, label, 3, 200, 0.02)
    probability = torch.softmax(features @ teacher.T, 1)
    view = torch.cat(
        [cluster_view(features[label == k], start[y_s[:, k] > 0], probability[label == k]) for k in range(3)]
    )

    def terms(h_s):
        p = np.exp(h_s @ teacher.numpy().T) / np.exp(h_s @ teacher.numpy().T).sum(1, keepdims=True)
        return np.array(
            [
                -np.log(p[y_s.numpy() > 0]).mean(),
                ((p - view.numpy()) ** 2).sum() / 6,
                ((h_s - start.numpy()) ** 2).sum() / 6,
            ]
        )

    distances, at_start = [], terms(start.numpy())
    for proximity in (0.03, 0.3, 3.0):
        refined = clust_gdd(sample, COUNTS, 0, proximity=proximity)[0] / size
        factors = np.array([1.0, 0.3, proximity])
        loss = refinement_loss(refined, start, y_s, view, teacher, 0.3, proximity)
        assert float(loss) == pytest.approx(float(factors @ terms(refined.numpy())), rel=1e-4)
        assert float(loss) < 0.9 * float(factors @ at_start)
        distances.append(float((refined - start).norm() / start.norm()))
    assert distances[0] > distances[1] > distances[2] > 0
    assert distances[1] < 0.5
    torch.testing.assert_close(clust_gdd(sample, COUNTS, 0, steps=0)[0] / size, start)


def test_consistency_pulls_the_refined_towards_what_the_cluster_looks_like():
    """With a heavy weight the teacher says of a node what it says of its members on average; without, it is surer."""
    sample = mixture(spread=2.5)
    size = row_size(sample.features)
    features, label = torch.from_numpy(sample.features) / size, torch.from_numpy(sample.label).long()
    teacher = teacher_weights(features, label, 3, 200, 0.02)
    ones = np.array([1, 1, 1])
    probability = torch.softmax(features @ teacher.T, 1)
    view = torch.stack([probability[label == k].mean(0) for k in range(3)])
    sure, like_members = (
        torch.softmax(clust_gdd(sample, ones, 0, consistency=weight)[0] / size @ teacher.T, 1)
        for weight in (0.0, 100.0)
    )
    assert (like_members - view).abs().max() < 0.05
    assert (sure.diagonal() > like_members.diagonal() + 0.1).all()


# -- kernel ridge regression ------------------------------------------------------------------------------


def test_the_tangent_kernel_is_that_of_nodes_that_only_see_themselves():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 5)))
    torch.testing.assert_close(tangent_kernel(x, x), reference.kernel_ss(x, 1, 1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(tangent_kernel(x, 3 * x[:2]), 3 * tangent_kernel(x, x)[:, :2])
    x.requires_grad_()
    assert torch.autograd.grad(tangent_kernel(x, x).sum(), x)[0].isfinite().all()
    assert tangent_kernel(x, 0 * x[:2]).eq(0).all()  # a node may have nothing around it but zeros


def test_kernel_ridge_regression_on_the_learned_nodes_predicts_better():
    """The real rows, than on those of them it starts from, and with learned labels than without."""
    sample = mixture()
    size, errors = row_size(sample.features), []
    for settings in ({"steps": 0}, {"label_lr": 0.0}, {}):
        h_s, y_s = (part.double() for part in gc_sntk(sample, COUNTS, 0, **settings))
        k_ss = tangent_kernel(h_s / size, h_s / size)
        k_ss += 0.1 * k_ss.diagonal().mean() * torch.eye(6)
        k_ts = tangent_kernel(torch.from_numpy(sample.features).double() / size, h_s / size)
        predicted = k_ts @ torch.linalg.solve(k_ss, y_s)
        errors.append(float((predicted - one_hot(torch.from_numpy(sample.label).long(), 3)).pow(2).mean()))
    assert errors[2] < errors[1] < 0.8 * errors[0]
    start = torch.from_numpy(sample.features[select(sample, COUNTS, "random", 0)])
    torch.testing.assert_close(gc_sntk(sample, COUNTS, 0, steps=0)[0], start)
