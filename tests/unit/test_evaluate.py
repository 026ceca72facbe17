"""Evaluation: one recipe for every set, selection on validation, the test nodes scored once."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cross_entropy

from talk_dist.config import DistillConfig, InnerConfig, KernelConfig, StudentConfig
from talk_dist.data.tag import TokenLists
from talk_dist.errors import ConfigError, DataError
from talk_dist.evaluate import EvaluateConfig, Row, as_metrics, evaluate, reference, retention, table
from talk_dist.models.gnn import Student, local_graph
from talk_dist.models.inner import one_hot, smoothed, train
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.full import WholeGraph, fit_full
from talk_dist.runtime.outer import accuracy, macro_f1, student_accuracy
from talk_dist.runtime.pool import LocalPool
from talk_dist.synthetic.coresets import allocate
from talk_dist.training_sets import coreset_tag, full_set, train_on

CONFIG = DistillConfig(kernel=KernelConfig(precision="float64"))


def quick(**changes):
    recipe = InnerConfig(passes=20, gnn_lr=0.02, patience=20)
    student = StudentConfig(hidden=16, dropout=0.0)
    settings = {"seeds": 2, "recipe": recipe, "student": student, "full_lr": (0.02,), "full_label_smoothing": (0.1,)}
    return EvaluateConfig(**(settings | {"full_epochs": 1} | changes))


def a_coreset(pool, encoder, method="random"):
    return coreset_tag(pool, encoder, allocate(6, pool.tag.train_class_counts), method, DistillConfig())[0]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("kind", ["gcn", "sage", "sgc", "appnp", "gat"])
def test_every_student_on_every_set(make_encoder, make_pool, adapters, kind):
    encoder = make_encoder(adapters=adapters)
    pool = make_pool(encoder, 2)
    against = ("full", "random") if adapters else EvaluateConfig.against
    config = quick(student=StudentConfig(kind=kind, hidden=16, dropout=0.0), against=against)
    rows = evaluate(pool, encoder, a_coreset(pool, encoder), CONFIG, config)
    assert [row.name for row in rows] == ["synthetic", *config.against]
    assert all(len(row.accuracy) == 2 and 0 <= min(row.accuracy) <= max(row.accuracy) <= 1 for row in rows)
    assert rows[1].nodes == pool.tag.meta["split_sizes"]["train"]
    # the "synthetic" set here is the random coreset: the same set, the same scores
    assert dict(enumerate(rows[0].accuracy)) == dict(enumerate(rows[2].accuracy))
    if not adapters:
        assert evaluate(pool, encoder, a_coreset(pool, encoder), CONFIG, quick(student=config.student))[1] == rows[1]


def test_the_pass_is_chosen_on_validation_and_test_is_read_once_a_seed(make_encoder, make_pool, monkeypatch):
    encoder = make_encoder()
    pool = make_pool(encoder, 1)
    asked = []
    ask = pool.student_scores
    monkeypatch.setattr(pool, "student_scores", lambda s, split, *told: (asked.append(split), ask(s, split, *told))[1])
    evaluate(pool, encoder, a_coreset(pool, encoder), CONFIG, quick(against=("full",)))
    reads = [i for i, split in enumerate(asked) if split == "test"]
    assert len(reads) == 4  # two sets, two seeds
    assert all(asked[i - 1] != "test" for i in reads[:3])  # each after validations of its own, and the full set's
    assert reads[3] == reads[2] + 1  # once all of its students are there


@pytest.mark.parametrize("adapters", [False, True])
def test_the_reference_has_the_best_of_its_choices(make_encoder, make_pool, adapters):
    """By validation, one by one; with adapters the encodings without them decide, and they follow."""
    encoder = make_encoder(adapters=adapters)
    pool = make_pool(encoder, 2)
    whole = WholeGraph(pool.tag)
    choices = {"full_lr": (1e-4, 0.02), "full_label_smoothing": (0.0, 0.9)}

    def alone(choice, **changes):
        settings = quick(full_lr=choice[:1], full_label_smoothing=choice[1:], **changes)
        return reference(whole, pool, encoder, settings)

    worth = {c: np.mean(alone(c, full_epochs=0).val_accuracy) for c in itertools.product(*choices.values())}
    assert len(set(worth.values())) > 1
    best = max(worth, key=worth.get)
    found = reference(whole, pool, encoder, quick(**choices))
    assert found == alone(best)
    assert found.chosen == dict(zip(("gnn_lr", "label_smoothing"), best, strict=True))


def test_an_epoch_of_the_joint_reference_has_every_training_node_once(make_encoder, make_pool, monkeypatch):
    """No batch of texts spans two epochs, where a node might be in it twice and count twice."""
    encoder = make_encoder(adapters=True)
    pool = make_pool(encoder, 1)
    whole, seen, padded = WholeGraph(pool.tag), [], TokenLists.padded
    monkeypatch.setattr(TokenLists, "padded", lambda lists, rows: seen.append(rows) or padded(lists, rows))
    monkeypatch.setattr("talk_dist.runtime.full.BATCH", 4)
    encoder.reset_adapters(0)
    pool.encode(encoder.adapters())
    seen.clear()
    monkeypatch.setattr(pool, "encode", lambda *_: False)  # it pads texts too
    student = Student(StudentConfig(hidden=16), encoder.width, len(pool.tag.classes), 0)
    fit_full(encoder, student, pool, whole, quick().recipe, 3, seed=0)
    count = -(-len(whole.train) // 4)
    assert len(seen) == 3 * count
    for epoch in range(3):
        rows = np.concatenate(seen[epoch * count : (epoch + 1) * count])
        np.testing.assert_array_equal(np.sort(rows), np.sort(whole.train))
    assert max(map(len, seen)) <= 4


def test_each_epoch_of_the_joint_reference_sees_neighbours_as_they_are_now(make_encoder, make_pool, monkeypatch):
    encoder = make_encoder(adapters=True)
    pool = make_pool(encoder, 1)
    whole, seen, gathered, gather = WholeGraph(pool.tag), [], [], pool.gather
    monkeypatch.setattr(pool, "gather", lambda: gathered.append(gather()) or gathered[-1])
    student = Student(StudentConfig(hidden=16), encoder.width, len(pool.tag.classes), 0)
    student.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().clone()))
    recipe = dataclasses.replace(quick().recipe, adapter_lr=0.05)
    fit_full(encoder, student, pool, whole, recipe, 2, seed=0)
    others = np.setdiff1d(np.arange(len(gathered[0])), whole.train)
    np.testing.assert_array_equal(seen[-1][others], gathered[1][others])
    assert not np.array_equal(gathered[1], gathered[0])


def test_a_graph_without_test_nodes_is_refused(make_encoder, make_pool, prepare_graph, graph):
    split = ["val" if part == "test" else part for part in graph.split]
    nodes = graph.nodes.set_column(graph.nodes.column_names.index("split"), "split", pa.array(split))
    tag, encoder = prepare_graph(dataclasses.replace(graph, nodes=nodes)), make_encoder()
    pool = LocalPool(tag, encoder, KernelConfig(), RuntimeConfig(cache=False))
    pool.encode({})
    with pytest.raises(DataError, match="no labelled node is in the test split"):
        evaluate(pool, encoder, a_coreset(pool, encoder), CONFIG, quick())


def test_training_goes_on_while_validation_rises(make_encoder, make_pool, monkeypatch):
    """On every set alike: up to `recipe.passes`, and it ends after ten validations that are no better."""
    encoder = make_encoder()
    pool = make_pool(encoder, 1)
    pool.encode(encoder.adapters())
    whole, small, looks = WholeGraph(pool.tag), a_coreset(pool, encoder), []
    recipe = dataclasses.replace(EvaluateConfig().recipe, passes=30, patience=30, select_every=1)
    settings = quick(seeds=1, full_epochs=0, recipe=recipe)

    def validation(worth):
        looks.append(worth(len(looks)))
        return looks[-1]

    for worth, passes in [(lambda look: look / 99, 30), (lambda look: 0.5, 11)]:
        for place in ("runtime.full", "training_sets"):
            monkeypatch.setattr(f"talk_dist.{place}.student_accuracy", lambda *_, worth=worth: validation(worth))
        looks.clear()
        reference(whole, pool, encoder, settings)
        assert len(looks) == passes
        looks.clear()
        train_on(small, Student(settings.student, encoder.width, 3, 0), pool, encoder, recipe, 0)
        assert len(looks) == passes


@pytest.mark.parametrize("adapters", [False, True])
def test_progress_counts_passes_of_all_students(make_encoder, make_pool, adapters):
    """It never falls back (but where adapters join, once a student), grows within each student and ends at the end."""
    encoder, told = make_encoder(adapters=adapters), {}

    def report(stage, done, total, facts):
        told.setdefault(stage, []).append((done, total, dict(facts)))

    pool, config = make_pool(encoder, 1), quick(seeds=3, full_epochs=0, against=("full", "herding"))
    evaluate(pool, encoder, a_coreset(pool, encoder), CONFIG, config, report)
    for name in ("synthetic", "full, learning rate 0.02, label smoothing 0.1", "herding"):
        done, total, facts = zip(*told[name], strict=True)
        assert set(total) == {3 * 20}
        assert done[0] == 0
        assert done[-1] == 60
        assert done.count(60) == 1
        falls = sum(later < earlier for earlier, later in itertools.pairwise(done))
        assert falls == (3 if adapters and not name.startswith("full") else 0)  # nothing joins without epochs
        assert len(done) >= 3 * 10  # told within a student, not after it alone
        assert all(("val" in fact) == (at >= 20) for at, fact in zip(done, facts, strict=True))


def test_smoothed_labels_of_the_reference_are_those_of_a_small_set(make_encoder, make_pool):
    """Class indices with torch's smoothing train the student that the probabilities `smoothed` train."""
    encoder = make_encoder()
    pool, config = make_pool(encoder, 1), quick(student=StudentConfig(hidden=16, dropout=0.0))
    pool.encode(encoder.adapters())
    whole = WholeGraph(pool.tag)
    trained = full_set(whole, pool, encoder, config.recipe, 0, 0.3)
    student = Student(config.student, encoder.width, len(pool.tag.classes), 0)
    trained.train(student, 0, lambda *_: None)

    twin = Student(config.student, encoder.width, len(pool.tag.classes), 0)
    graph = local_graph(config.student, whole.indptr, whole.indices, whole.degree)
    h, rows = torch.from_numpy(pool.gather()), torch.from_numpy(whole.train)
    targets = smoothed(one_hot(whole.label, len(pool.tag.classes)), 0.3)

    def step(_: int) -> torch.Tensor:
        loss = cross_entropy(twin(h, graph)[rows], targets[rows])
        loss.backward()
        return loss.detach()

    train(step, twin, config.recipe, seed=0, select=lambda s: student_accuracy(pool, s, "val"))
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_adapters_never_validate_worse_than_the_encoder_as_it_was(make_encoder, make_pool):
    """Their training begins with the student of the frozen encoder. What was scored before does not matter."""
    scores, config = [], quick(student=StudentConfig(hidden=16, dropout=0.5), against=("full", "random"))
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, adapter_lr=0.3))
    for encoder in (make_encoder(), make_encoder(adapters=True)):
        pool = make_pool(encoder, 2)
        rows = evaluate(pool, encoder, a_coreset(pool, encoder, "medoid"), CONFIG, config)
        scores.append([row.val_accuracy for row in rows])
    assert np.all(np.array(scores[1]) >= scores[0])
    assert scores[1] != scores[0]
    other = dataclasses.replace(config, against=("kcenter", "full"))
    again = evaluate(pool, encoder, a_coreset(pool, encoder, "medoid"), CONFIG, other)
    assert again[2] == rows[1]


@pytest.mark.parametrize("parts", [2, 7])
def test_the_whole_graph_is_put_together_again(make_encoder, make_pool, graph, parts):
    """The full-data reference sees the same graph whatever the sharding."""
    pool = make_pool(make_encoder(), parts)
    whole = WholeGraph(pool.tag)
    node = np.concatenate([shard.part.node for shard in pool.shards])
    dense = np.zeros((len(node), len(node)))
    dense[np.repeat(np.arange(len(node)), np.diff(whole.indptr)), whole.indices] = 1
    assert np.array_equal(dense, graph.adjacency.numpy()[node][:, node])
    assert sorted(node[whole.train]) == sorted(graph.rows("train"))


def test_coresets_are_the_real_texts(make_encoder, make_pool):
    """Their embeddings, masked, encode to what the texts themselves encode to."""
    encoder = make_encoder()
    pool = make_pool(encoder, 2)
    tag = a_coreset(pool, encoder, "herding")
    h = encoder.encode_embeds(tag.token_embeds, tag.mask).numpy()
    everything = pool.gather()
    nearest = np.linalg.norm(everything[None] - h[:, None], axis=2).min(1)
    assert nearest.max() < 1e-5


def test_scores_by_hand():
    counts = np.array([[3, 1], [2, 4]])
    assert accuracy(counts) == pytest.approx(0.7)
    assert macro_f1(counts) == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert macro_f1(np.array([[2, 0, 0], [0, 3, 0], [0, 0, 0]])) == 1.0  # a class without nodes does not count


def test_the_table_and_retention():
    rows = [Row("synthetic", 7, 1200, (0.8, 0.9), (0.7, 0.7), (0.8, 0.8), 0.81),
            Row("full", 1000, 99, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), None)]  # fmt: skip
    assert retention(rows, rows[0]) == pytest.approx(0.85)
    assert retention(rows[:1], rows[0]) is None
    wrong = dataclasses.replace(rows[1], accuracy=(0.0,))
    assert retention([rows[0], wrong], rows[0]) is None
    assert "| synthetic | 7 | 1,200 | 0.850 ± 0.050 | 0.700 ± 0.000 | 0.810 | 0.850 |" in table(rows)
    assert "| full | 1,000 | 99 | 1.000 ± 0.000 | 1.000 ± 0.000 | – | 1.000 |" in table(rows)
    assert as_metrics(rows, quick())["retention"]["full"] == 1.0


def test_classes_of_another_graph_are_refused(make_encoder, make_pool):
    encoder = make_encoder()
    pool = make_pool(encoder, 1)
    tag = a_coreset(pool, encoder)
    other = dataclasses.replace(tag, config=tag.config | {"classes": ["x", "y", "z"]})
    with pytest.raises(DataError, match=r"has the classes \['x', 'y', 'z'\]"):
        evaluate(pool, encoder, other, CONFIG, quick())


def test_the_reference_takes_encodings_from_disk(make_encoder, make_pool):
    """In half precision there."""
    encoder = make_encoder()
    pool = make_pool(encoder, 2, fields="disk")
    assert len(reference(WholeGraph(pool.tag), pool, encoder, quick()).accuracy) == 2


def test_adapters_that_do_nothing_yet_encode_nothing_again(make_encoder, make_pool, monkeypatch):
    """A choice of learning rate needs the texts' encodings once, however many students it takes."""
    encoder = make_encoder(adapters=True)
    pool = make_pool(encoder, 1)
    monkeypatch.delattr(encoder.__class__, "encode_tokens")  # the pool has encoded
    reference(WholeGraph(pool.tag), pool, encoder, quick(full_epochs=0, full_lr=(0.01, 0.02)))


def test_an_unknown_rival_is_refused():
    with pytest.raises(ConfigError, match="each one of full, random"):
        EvaluateConfig(against=("best",))  # type: ignore[arg-type]


def test_dropout_is_off_when_a_student_is_scored(make_encoder, make_pool):
    from talk_dist.runtime.outer import student_accuracy

    encoder = make_encoder()
    pool = make_pool(encoder, 2)
    student = Student(StudentConfig(hidden=64, dropout=0.9), encoder.width, 3, 0).train()
    assert len({student_accuracy(pool, student, "val") for _ in range(5)}) == 1
    assert torch.isfinite(next(student.parameters())).all()
