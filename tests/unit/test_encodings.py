"""Stage one through students: its gradient against the dense whole, and what it keeps."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from talk_dist.config import DistillConfig, InnerConfig, KernelConfig, OuterConfig, StudentConfig, TwoStageConfig
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings, smoothed
from talk_dist.models.unrolled import Unrolled
from talk_dist.runtime.outer import Objective
from talk_dist.synthetic import encodings
from talk_dist.synthetic.encodings import optimise_encodings, student_gradient

M, CLASSES = 24, 3
CONFIG = DistillConfig(
    kernel=KernelConfig(block=16),
    student=StudentConfig(hidden=16),
    inner=InnerConfig(passes=40, gnn_lr=0.02),
    outer=OuterConfig(targets="labels"),
    two_stage=TwoStageConfig(feature_steps=0, student_steps=40, student_passes=30, validate_every=10, feature_lr=0.05),
)


@pytest.fixture(scope="module")
def start():
    """Encodings that say little, and labels class by class."""
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(M, 8, generator=generator), torch.eye(CLASSES).repeat_interleave(M // CLASSES, 0)


def real_rows(graph, encoder, tags):
    """P^2 H and labels of the training rows."""
    h = torch.from_numpy(encoder.encode_tokens(tags[1].partition(0).tokens))
    p, rows = reference.propagation(graph.adjacency, "mean"), graph.rows("train")
    return (p @ p @ h).float()[rows], torch.from_numpy(graph.label[rows]).long()


def mean_loss(features, labels, h_s, y_s, config, seeds):
    """Of students that nobody has trained yet, on real rows by themselves."""
    found = []
    for seed in seeds:
        student = Student(config.student, features.shape[1], CLASSES, seed)
        fit_encodings(student, h_s, y_s, config.inner, seed=seed)
        with torch.no_grad():
            found.append(float(cross_entropy(student.eval()(features), labels)))
    return float(np.mean(found))


def test_gradient_is_that_of_the_dense_whole(graph, tags, table_encoder, make_pool, start):
    """In any sharding; all rows at once, one block."""
    h_s, y_s = start
    config = replace(CONFIG, kernel=KernelConfig(), outer=OuterConfig(rows=0, targets="labels"))
    encoder = table_encoder()
    features, labels = real_rows(graph, encoder, tags)
    found = [student_gradient(make_pool(encoder, parts, architecture="sgc"), h_s, y_s, config, 3) for parts in (1, 7)]

    seed = config.seed + 1_000_003 * 4
    passes = int(np.random.default_rng(seed).integers(15, 31))
    student = Student(config.student, 8, CLASSES, seed)
    trained = Unrolled(student, h_s, 0.9 * y_s + 0.1 / CLASSES, config.inner, passes, seed)
    weights = {name: value.detach().requires_grad_() for name, value in trained.weights.items()}
    loss = cross_entropy(functional_call(student.eval(), weights, (features,)), labels)
    d_weights = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    expected = trained.pull(d_weights)
    for value, d_hs in found:
        assert value == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(d_hs, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def steps_alone(told):
    """A report that notes all but validations."""
    return lambda stage, *at: stage == "validate" or told.append((stage, *at))


def test_blocks_take_turns(table_encoder, make_pool, start, monkeypatch):
    """A step's gradient is of one block's nodes, and after as many steps as there are blocks all have moved."""
    h_s, y_s = start
    pool = make_pool(table_encoder(), 2, architecture="sgc")
    alone = replace(CONFIG, kernel=KernelConfig(block=0))
    for step in range(3):
        loss, gradient = student_gradient(pool, h_s, y_s, CONFIG, step)
        assert gradient.shape == (12, 8)
        assert loss != student_gradient(pool, h_s, y_s, alone, step)[0]
    config = replace(CONFIG, two_stage=replace(CONFIG.two_stage, student_steps=10))
    told, seen, gradient_of = [], [], encodings.student_gradient

    def noted(pool, now, *others):
        seen.append(now.clone())
        return gradient_of(pool, now, *others)

    monkeypatch.setattr(encodings, "student_gradient", noted)
    after = optimise_encodings(pool, *start, config, steps_alone(told)).h_s
    assert told[-1][1] == 20
    assert {total for _, _, total, _ in told} == {20}
    assert ((after - h_s).abs().sum(1) > 0).all()
    moved = [(two - one).abs().sum(1) > 0 for one, two in itertools.pairwise(seen)]
    assert all(rows.tolist() == [node % 2 == step % 2 for node in range(M)] for step, rows in enumerate(moved))


def test_students_that_nobody_has_seen_profit(graph, tags, table_encoder, make_pool, start):
    encoder, (h_s, y_s) = table_encoder(), start
    pool = make_pool(encoder, 2, architecture="sgc")
    after = optimise_encodings(pool, h_s, y_s, CONFIG, lambda *_: None).h_s
    real, seeds = real_rows(graph, encoder, tags), range(100, 105)
    losses = [mean_loss(*real, h, smoothed(y_s, 0.1), CONFIG, seeds) for h in (h_s, after)]
    assert losses[1] < 0.8 * losses[0]


def test_what_is_no_better_is_not_kept(table_encoder, make_pool, start):
    """Steps that lead nowhere end where they began, to the bit; so does none at all."""
    pool = make_pool(table_encoder(), 2, architecture="sgc")
    for settings in ({"feature_lr": 1e-9}, {"student_steps": 0}):
        config = replace(CONFIG, two_stage=replace(CONFIG.two_stage, **settings))
        after = optimise_encodings(pool, *start, config, lambda *_: None).h_s
        assert torch.equal(after, start[0])


def test_progress_goes_on_from_the_kernel_to_the_students(table_encoder, make_pool, start):
    pool, told = make_pool(table_encoder(), 1, architecture="sgc"), []
    config = replace(
        CONFIG, kernel=KernelConfig(), two_stage=replace(CONFIG.two_stage, feature_steps=5, student_steps=6)
    )
    found = optimise_encodings(pool, *start, config, steps_alone(told))
    done = [done for _, done, _, _ in told]
    assert done[:6] == [*range(6)]
    assert done[6:-1] == [*range(6, 6 + len(done) - 7)]
    assert done[-1] == 11
    assert {(stage, total) for stage, _, total, _ in told} == {("encodings", 11)}
    assert all(metrics["val"] > 0 for _, _, _, metrics in told)
    steps = [(record["stage"], record["step"]) for record in found.history]
    assert steps == [("kernel", 0), ("kernel", 5), ("students", 0), ("students", len(done) - 6)]
    assert told[5][3]["val"] == max(record["val_accuracy"] for record in found.history[:2])


def test_smoothing_changes_nothing_that_the_kernel_predictor_chooses(table_encoder, make_pool, start):
    h_s, y_s = start
    pool = make_pool(table_encoder(), 2, architecture="sgc")
    objective = Objective(pool, CONFIG)
    soft = smoothed(y_s, 0.3)
    torch.testing.assert_close(soft.sum(1), torch.ones(M))
    assert float(soft.max()) == pytest.approx(0.8)
    np.testing.assert_array_equal(objective.krr_counts(h_s, soft, "all"), objective.krr_counts(h_s, y_s, "all"))


# -- what stage one keeps, and when it stops ------------------------------------------------------------------

SHORT = replace(
    CONFIG,
    kernel=KernelConfig(block=0),
    inner=InnerConfig(passes=5),
    two_stage=TwoStageConfig(feature_steps=0, student_steps=6, student_passes=4, validate_every=2, feature_lr=0.05),
)


@pytest.fixture
def judges(monkeypatch):
    """judges(values) -> the encodings that they were shown, one a value."""

    def script(values):
        seen, left = [], iter(values)
        monkeypatch.setattr(encodings, "judged", lambda _, h_s, *__: seen.append(h_s.detach().clone()) or next(left))
        return seen

    return script


@pytest.fixture
def optimised(table_encoder, make_pool, start):
    """optimised(config) -> what stage one finds."""
    pool = make_pool(table_encoder(), 1, architecture="sgc")
    return lambda config: optimise_encodings(pool, *start, config, lambda *_: None)


def test_students_must_be_half_a_standard_error_better(optimised, judges, tags):
    """And the best of those who are stays, not the last."""
    needed = 0.5 + 0.5 * (0.25 / tags[1].meta["split_sizes"]["val"]) ** 0.5
    seen = judges([0.5, 0.5, *[needed - 1e-6] * 3])
    assert optimised(SHORT).h_s.equal(seen[0])
    seen = judges([0.5, 0.5, needed + 1e-6, needed + 2e-6, needed + 1.5e-6])
    assert optimised(SHORT).h_s.equal(seen[3])


def test_students_stop_at_the_first_validation_no_better_than_the_start(optimised, judges):
    seen = judges([0.5, 0.5, 0.9, 0.5, 0.99])
    assert optimised(SHORT).h_s.equal(seen[2])
    assert len(seen) == 4


def test_against_the_kernel_the_best_validated_stays(optimised, judges):
    """With the temperature that it had."""
    alone = replace(SHORT, two_stage=replace(SHORT.two_stage, feature_steps=6, student_steps=0))
    alone = replace(alone, outer=OuterConfig(targets="labels", loss="ce"))
    seen = judges([0.1, 0.9, 0.9, 0.3])
    found = optimised(alone)
    assert found.h_s.equal(seen[1])
    judges([0.1, 0.9])
    stopped = optimised(replace(alone, two_stage=replace(alone.two_stage, feature_steps=2)))
    assert found.log_temperature == stopped.log_temperature != Objective.initial_log_temperature


def test_a_step_is_relative_to_the_size_of_the_encodings(optimised, judges):
    """Adam's first step is its rate, whatever the gradient."""
    seen = judges([0.1, 0.2])
    optimised(replace(SHORT, two_stage=replace(SHORT.two_stage, feature_steps=1, student_steps=0, validate_every=1)))
    moved, size = (seen[1] - seen[0]).abs().max(), seen[0].square().mean().sqrt()
    assert float(moved) == pytest.approx(0.05 * float(size), rel=1e-3)


def test_judges_are_so_many_fresh_students_of_softened_labels(start, monkeypatch):
    fitted, scores = [], iter([0.2, 0.4, 0.9])
    monkeypatch.setattr(encodings, "fit_encodings", lambda _, __, labels, ___, seed: fitted.append((seed, labels)))
    monkeypatch.setattr(encodings, "student_accuracy", lambda *_: next(scores))
    assert encodings.judged(None, *start, replace(SHORT, seed=7), 3, None) == pytest.approx(0.5)
    assert [seed for seed, _ in fitted] == [7, 8, 9]
    assert all(labels.equal(smoothed(start[1], 0.1)) for _, labels in fitted)


def test_every_block_of_students_sees_every_fold(table_encoder, make_pool, start, monkeypatch):
    pool, seen = make_pool(table_encoder(), 1, architecture="sgc"), set()
    monkeypatch.setattr(Objective, "folds", lambda *_: 2)
    grads = pool.student_grads
    monkeypatch.setattr(pool, "student_grads", lambda s, loss: seen.add((loss.block, loss.fold)) or grads(s, loss))
    for step in range(4):
        student_gradient(pool, *start, CONFIG, step)  # two blocks
    assert len(seen) == 4


def test_a_row_is_predicted_by_its_own_block_alone(table_encoder, make_pool, start):
    """So that the counts of all blocks sum to the rows of the split."""
    pool = make_pool(table_encoder(), 2, architecture="sgc")
    counts = Objective(pool, CONFIG).krr_counts(*start, "val")
    assert counts.sum() == pool.tag.meta["split_sizes"]["val"]


def test_folds_are_of_all_rows_with_a_teacher_and_of_a_block_s_share(table_encoder, make_pool):
    pool = make_pool(table_encoder(), 1)
    meta = pool.tag.meta

    def folds(targets, block):
        outer = OuterConfig(rows=16, targets=targets)
        return Objective(pool, DistillConfig(kernel=KernelConfig(block=block), outer=outer)).folds(32)

    assert folds("teacher", 0) == round(meta["num_nodes"] / 16)
    assert folds("labels", 0) == round(meta["split_sizes"]["train"] / 16) != folds("teacher", 0)
    assert folds("teacher", 16) == round(meta["num_nodes"] / 32)
