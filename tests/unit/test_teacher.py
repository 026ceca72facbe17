"""The teacher: whose rows it learns from and is chosen on, and that it does not depend on the sharding."""

import dataclasses

import numpy as np
import pytest
import torch

from talk_dist.config import DistillConfig
from talk_dist.models.gnn import Student
from talk_dist.runtime import teacher as module
from talk_dist.runtime.boundary import LossSpec, StudentState
from talk_dist.runtime.teacher import RealSide, trained_teacher

CONFIG = DistillConfig.from_dict({"student": {"hidden": 16, "dropout": 0.5}, "inner": {"passes": 20, "gnn_lr": 0.02}})


def nothing(*_):
    pass


@pytest.fixture
def few(monkeypatch):
    """At most four rows of a class in a sample, eight in a batch."""
    monkeypatch.setattr(module, "SAMPLE_MINIMUM", 4)
    monkeypatch.setattr(module, "BATCH", 8)


class Always(torch.nn.Module):
    """Says one class of every row."""

    def __init__(self, said, classes):
        super().__init__()
        self.scores = torch.eye(classes)[said]

    def forward(self, x):
        return self.scores.expand(len(x), -1)


def test_sampled_rows_count_as_the_rows_that_they_stand_for(few, make_encoder, make_pool):
    """Of a capped sample: the accuracy of a constant is its class's share of the split, and so often is it drawn."""
    encoder = make_encoder()
    pool = make_pool(encoder, 2)
    pool.encode(encoder.adapters())
    for split in ("train", "val"):
        counts = np.array(pool.tag.meta["class_counts"][split])
        rows = module._Rows(pool, split, 0)
        assert len(rows.label) == np.minimum(counts, 4).sum() < counts.sum()
        for said in range(3):
            assert rows.accuracy(Always(said, 3)) == pytest.approx(counts[said] / counts.sum())
        torch.manual_seed(0)
        drawn = torch.cat([rows.drawn()[1] for _ in range(2000)])
        np.testing.assert_allclose(np.bincount(drawn) / len(drawn), counts / counts.sum(), atol=0.02)


def test_a_small_graph_is_seen_whole(make_encoder, make_pool):
    encoder = make_encoder()
    pool = make_pool(encoder, 2)
    pool.encode(encoder.adapters())
    rows = module._Rows(pool, "train", 0)
    features, label = rows.drawn()
    np.testing.assert_array_equal(np.bincount(label), pool.tag.train_class_counts)
    assert features is rows.features


@pytest.mark.parametrize("limited", [False, True])
def test_any_sharding_has_the_same_teacher(request, limited, make_encoder, make_pool):
    if limited:
        request.getfixturevalue("few")
    encoder, found = make_encoder(), []
    for parts in (1, 2, 7):
        pool = make_pool(encoder, parts)
        pool.encode(encoder.adapters())
        found.append(trained_teacher(pool, CONFIG, nothing).state_dict())
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("better", [0.5, 0.0])
def test_it_learns_with_dropout_and_without_and_the_better_stays(make_encoder, make_pool, monkeypatch, better):
    encoder = make_encoder()
    pool = make_pool(encoder, 1)
    pool.encode(encoder.adapters())
    monkeypatch.setattr(
        module._Rows, "accuracy", lambda rows, student: 0.6 if student.config.dropout == better else 0.3
    )
    assert trained_teacher(pool, CONFIG, nothing).config.dropout == better


def test_it_stops_when_validation_no_longer_rises(make_encoder, make_pool, monkeypatch):
    """After so many validations that are no better, and after five times a student's passes at the latest."""
    encoder = make_encoder()
    pool = make_pool(encoder, 1)
    pool.encode(encoder.adapters())
    plain = dataclasses.replace(CONFIG, student=dataclasses.replace(CONFIG.student, dropout=0.0))
    for values, looks in [([0.1] * 99, 1 + module.PATIENCE), (np.linspace(0, 1, 99).tolist(), 10)]:
        asked = iter(values)
        told = []
        monkeypatch.setattr(module._Rows, "accuracy", lambda rows, student, asked=asked: next(asked))
        trained_teacher(pool, plain, lambda stage, done, total, facts, told=told: told.append((done, total)))
        assert told == [(10 * (look + 1), 100) for look in range(looks)]


def test_shards_are_taught_once_an_encoding(make_encoder, make_pool, monkeypatch):
    """And what the shards then follow is that teacher."""
    encoder = make_encoder()
    pool = make_pool(encoder, 2)
    real, trained = RealSide(pool, CONFIG), []
    monkeypatch.setattr(
        module, "trained_teacher", lambda *given: trained.append(trained_teacher(*given)) or trained[-1]
    )
    real.encode(encoder, nothing)
    assert not trained
    for _ in range(2):
        real.teach(nothing)
        real.encode(encoder, nothing)
    (teacher,) = trained
    student = Student(CONFIG.student, encoder.width, 3, 5)
    spec = LossSpec("ce", targets="teacher")
    found = pool.student_grads(StudentState.of(student), spec)
    pool.learn(StudentState.of(teacher))
    again = pool.student_grads(StudentState.of(student), spec)
    assert found.num_rows == pool.tag.num_nodes
    assert found.loss == again.loss


def test_it_learns_from_training_rows_and_is_chosen_on_validation_rows(make_encoder, make_pool, monkeypatch):
    pool, used = make_pool(make_encoder(), 1), {"drawn": set(), "accuracy": set()}

    def noting(name):
        method = getattr(module._Rows, name)
        return lambda rows, *given: used[name].add(len(rows.label)) or method(rows, *given)

    for name in used:
        monkeypatch.setattr(module._Rows, name, noting(name))
    trained_teacher(pool, CONFIG, nothing)
    train, val = (pool.tag.meta["split_sizes"][split] for split in ("train", "val"))
    assert used == {"drawn": {train}, "accuracy": {val}}
    assert train != val
