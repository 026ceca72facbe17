"""Coresets against their definitions by brute force, and how a synthetic set starts."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from talk_dist.config import (
    DistillConfig,
    InnerConfig,
    KernelConfig,
    OuterConfig,
    StudentConfig,
    SyntheticConfig,
    TwoStageConfig,
)
from talk_dist.data.tag import TokenLists
from talk_dist.errors import ConfigError
from talk_dist.runtime.outer import Objective
from talk_dist.runtime.pool import TrainSample
from talk_dist.runtime.teacher import RealSide
from talk_dist.synthetic.coresets import METHODS, allocate, centres, herding, kcenter, medoid, select
from talk_dist.synthetic.encodings import optimise_encodings
from talk_dist.synthetic.init import class_counts, embed, fit_tokens, initialise, num_synthetic

counts_of_classes = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(counts_of_classes, st.integers(0, 12), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
@example([1, 1, 1, 1, 96], 1, 1)  # what the small classes get for free is taken from the large one
@example([1, 1, 96], 9, 3)
@example([2, 2, 2], 2, 1)
def test_allocation_is_the_nearest_to_proportional(class_counts, extra, blocks):
    """Of all ways to give every class at least one node a block, or as many as there are, the smallest squared distance
    to the exact shares."""
    class_counts, total = np.array(class_counts), len(class_counts) + extra
    mine, share = allocate(total, class_counts, blocks), class_counts / class_counts.sum() * total
    assert mine.sum() == total
    least = min(blocks, total // len(class_counts))
    assert mine.min() >= least
    if least == blocks:  # no block lacks a class
        label = np.repeat(np.arange(len(class_counts)), mine)
        assert all(len(set(label[block::blocks])) == len(class_counts) for block in range(blocks))
    cuts = itertools.combinations(range(1, total), len(class_counts) - 1)
    every = [np.diff([0, *cut, total]) for cut in cuts]
    best = min(((counts - share) ** 2).sum() for counts in every if counts.min() >= least)
    assert ((mine - share) ** 2).sum() == pytest.approx(best)
    larger = class_counts[:, None] > class_counts[None]
    assert (mine[:, None] >= mine[None])[larger].all()  # a larger class never gets fewer


def test_fewer_nodes_than_classes_are_refused():
    """With the size that would do."""
    with pytest.raises(ConfigError, match=r"2 nodes for 3 classes; .*--synthetic\.size 3"):
        allocate(2, np.array([5, 5, 5]))


def test_blocks_that_would_lack_a_class_are_refused():
    """With the size of block that would do."""
    tag = SimpleNamespace(num_nodes=1000, train_class_counts=np.full(20, 9))
    for size, least in ((20, 20), (40, 20), (50, 25)):
        sections = {"synthetic": {"size": size}, "kernel": {"block": least - 1}}
        with pytest.raises(ConfigError, match=rf"kernel\.block = {least - 1}: {size} .*; set {least} or more, or 0"):
            class_counts(tag, DistillConfig.from_dict(sections))
        for block in (least, 0):
            sections["kernel"]["block"] = block
            assert class_counts(tag, DistillConfig.from_dict(sections)).sum() == size


@st.composite
def points(draw):
    """Distinct points of a plane, clustered or not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.normal(size=(draw(st.integers(1, 9)), 2)) * draw(st.sampled_from([1.0, 10.0])) + rng.integers(-3, 4, 2)


@given(points(), st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_herding_takes_the_row_that_brings_the_running_mean_nearest(features, count):
    """At every step, of the rows that are left."""
    chosen = herding(features, count, seed=0).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, len(features))
    for step, mine in enumerate(chosen):
        left = [row for row in range(len(features)) if row not in chosen[:step]]
        distance = {r: np.linalg.norm(features[[*chosen[:step], r]].mean(0) - features.mean(0)) for r in left}
        assert distance[mine] == pytest.approx(min(distance.values()))


@given(points(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_kcenter_covers_within_twice_the_optimum(features, count):
    """The guarantee of the greedy farthest row, against every choice; the first row is the one nearest to the mean."""

    def radius(rows):
        return np.linalg.norm(features[:, None] - features[None, list(rows)], axis=2).min(1).max()

    chosen = kcenter(features, count, seed=0).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, len(features))
    optimum = min(radius(rows) for rows in itertools.combinations(range(len(features)), len(chosen)))
    assert radius(chosen) <= 2 * optimum + 1e-12
    assert chosen[0] == np.linalg.norm(features - features.mean(0), axis=1).argmin()
    assert chosen == kcenter(features, len(features), seed=0).tolist()[: len(chosen)]  # greedy: a prefix of more


def three_clusters():
    """Twelve rows around three far corners, and the row of each that is nearest to the middle of its cluster."""
    rng = np.random.default_rng(0)
    corners = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    features = corners.repeat(4, 0) + rng.normal(size=(12, 2))
    middles = features.reshape(3, 4, 2).mean(1)
    nearest = [int(np.linalg.norm(features - middle, axis=1).argmin()) for middle in middles]
    return features, middles, nearest


def test_centres_and_medoids_are_those_of_clear_clusters():
    """Centres are the means; medoids the rows nearest to them."""
    features, middles, nearest = three_clusters()
    found = centres(features, 3, seed=0)
    np.testing.assert_allclose(found[np.lexsort(found.T)], middles[np.lexsort(middles.T)])
    assert sorted(medoid(features, 3, seed=0).tolist()) == sorted(nearest)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("method", METHODS)
def test_chosen_rows_are_distinct_even_where_features_repeat(method):
    """As many different rows as there are, whatever repeats; more than there are gives all."""
    features = np.array([[0.0, 0.0]] * 3 + [[5.0, 5.0]] * 2)
    for count in range(1, 8):
        chosen = METHODS[method](features, count, 0).tolist()
        assert len(set(chosen)) == len(chosen) == min(count, 5)
        if count == 2 and method in ("kcenter", "medoid"):
            assert len(set(map(tuple, features[chosen]))) == 2


@pytest.mark.parametrize("method", METHODS)
def test_select_chooses_class_by_class_and_repeats_when_it_must(method):
    """As many of each class as asked, in the order of the classes; a class alone decides which of its rows."""
    rng = np.random.default_rng(0)
    label = np.array([0] * 6 + [1] * 2 + [2] * 5, np.int32)
    sample = TrainSample(label, rng.normal(size=(13, 4)).astype(np.float32), np.zeros((13, 2), np.int64))
    rows = select(sample, np.array([3, 5, 1]), method, seed=0)
    np.testing.assert_array_equal(label[rows], [0] * 3 + [1] * 5 + [2])
    assert len(set(rows[:3])) == 3
    assert sorted(np.bincount(rows[3:8], minlength=8)[6:]) == [2, 3]
    alone = METHODS[method](sample.features[8:].astype(np.float64), 1, 0)
    assert rows[8] == 8 + alone[0]


# -- how a synthetic set starts ---------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [(0.01, 23), (0.5, 1138), (1, 1), (7, 7), (70.0, 70)])
def test_size_is_a_fraction_below_one_else_a_number(size, expected):
    """M nodes of a graph of 2,277."""
    assert num_synthetic(size, 2277) == expected


def test_texts_are_cut_or_repeated_to_the_length(make_encoder):
    """As rows of the token table; a copy, since they are trained."""
    encoder = make_encoder()
    tokens = TokenLists(np.array([0, 3, 9]), np.array([2, 7, 3, 2, 9, 8, 7, 6, 3], np.int32))
    x = embed(encoder, tokens, 5)
    expected = encoder.token_table[torch.tensor([[2, 7, 3, 2, 7], [2, 9, 8, 7, 6]])]
    assert torch.equal(x, expected)
    x += 1
    assert torch.equal(embed(encoder, tokens, 5), expected)


@pytest.fixture
def settings_of():
    """settings_of(init) -> a small DistillConfig."""

    def make(init, **two_stage):
        return DistillConfig(
            kernel=KernelConfig(precision="float64", ridge=1e-3),
            synthetic=SyntheticConfig(size=8, tokens=6, init=init),
            two_stage=TwoStageConfig(
                **{"feature_steps": 12, "student_steps": 0, "token_steps": 25, "token_error": 0.0, **two_stage}
            ),
            student=StudentConfig(hidden=16),
            inner=InnerConfig(passes=20),
            outer=OuterConfig(targets="labels"),
        )

    return make


def start_of(pool, encoder, config, report=lambda *_: None):
    return initialise(RealSide(pool, config), encoder, config, report)


@pytest.mark.parametrize("init", ["random", "medoid"])
def test_a_start_is_made_of_real_training_texts(graph, tags, make_encoder, make_pool, settings_of, init):
    """Of the class that their label says, in any sharding; the random start is random, the medoids are not."""
    encoder = make_encoder()
    starts = [start_of(make_pool(encoder, parts), encoder, settings_of(init)) for parts in (1, 7)]
    assert torch.equal(starts[0].x_s, starts[1].x_s)
    start, texts = starts[0], tags[1].partition(0).tokens
    assert start.x_s.shape == (8, 6, 32)
    np.testing.assert_array_equal(start.y_s.round().sum(0), allocate(8, tags[1].train_class_counts))
    real = {label: embed(encoder, texts.take(rows), 6) for label, rows in by_class(graph).items()}
    for x, y in zip(start.x_s, start.y_s, strict=True):
        assert sorted(y.tolist()) == pytest.approx([0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3])
        assert (real[int(y.argmax())] == x).all(2).all(1).any()
    assert len(torch.unique(start.x_s.flatten(1), dim=0)) == 8


def by_class(graph):
    train = graph.rows("train")
    return {label: train[graph.label[train] == label] for label in range(3)}


def test_two_stages_lower_the_loss_and_then_fit_the_tokens(make_encoder, make_pool, settings_of):
    """Encodings with a lower loss than the medoids'; tokens whose encodings come nearer and nearer to them."""
    encoder, config, reports = make_encoder(), settings_of("two-stage"), []
    pool = make_pool(encoder, 2)
    start = start_of(pool, encoder, config, lambda *report: reports.append(report))
    losses = [values["loss"] for stage, _, _, values in reports if stage == "encodings"]
    errors = [values["relative_error"] for stage, _, _, values in reports if stage == "tokens"]
    assert (len(losses), len(errors)) == (13, 25)
    assert losses[-1] < 0.8 * losses[0]
    assert errors[-1] < 0.5 * errors[0]
    medoids = start_of(pool, encoder, settings_of("medoid"))
    assert torch.equal(start.y_s, medoids.y_s)
    objective = Objective(pool, config)
    one, two = (objective(encoder.encode_embeds(s.x_s), s.y_s, s.log_temperature).loss for s in (start, medoids))
    assert one < two


def test_without_steps_the_encodings_are_those_it_started_from(make_encoder, make_pool, settings_of):
    """Zero steps: nothing moves but nothing breaks."""
    encoder = make_encoder()
    start, y_s = torch.randn(3, encoder.width), torch.eye(3)
    config = settings_of("two-stage", feature_steps=0)
    found = optimise_encodings(make_pool(encoder, 1), start, y_s, config, lambda *_: None)
    assert torch.equal(found.h_s, start)
    assert found.log_temperature == Objective.initial_log_temperature


def test_blocks_choose_from_rows_of_their_own():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, 4)).astype(np.float32)
    sample = TrainSample(np.zeros(12, np.int32), features, np.zeros((12, 2), np.int64))
    rows = select(sample, np.array([6]), "medoid", 0, blocks=2)
    assert len(set(rows)) == 6
    assert all(row % 2 == turn % 2 for turn, row in enumerate(rows))


def test_the_goal_of_the_search_is_relative_to_a_node_s_squared_length(monkeypatch, make_encoder):
    goals, h_s = [], torch.randn(2, 32)
    monkeypatch.setattr("talk_dist.synthetic.init.invert", lambda _, x, steps, goal, tell: goals.append(goal) or x)
    fit_tokens(make_encoder(), torch.zeros(2, 4, 32), h_s, DistillConfig(), lambda *_: None)
    torch.testing.assert_close(goals[0], TwoStageConfig().token_error * h_s.square().sum(1))
