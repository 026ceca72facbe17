"""The page end to end on toy graphs: deterministic, independent of the sharding, best-so-far, any graph at all."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from talk_dist.config import DistillConfig
from talk_dist.data.tag import Partition
from talk_dist.distill import distill
from talk_dist.errors import ConfigError, DataError
from talk_dist.runtime.callbacks import Callback
from talk_dist.runtime.checkpoint import DistillState, OuterOptimizer
from talk_dist.runtime.outer import Objective

PAGE = sys.modules["talk_dist.distill"]  # the module: `talk_dist.distill` is the function


def settings(**sections):
    """A small distillation; ``sections`` are dicts of fields to change."""
    values = {
        "kernel": {"precision": "float64", "ridge": 0.1},
        "synthetic": {"size": 7, "tokens": 6, "init": "medoid", "label_smoothing": 0.0, "storage": "float32"},
        "two_stage": {"feature_steps": 20, "student_steps": 4, "student_passes": 10, "token_steps": 20},
        "student": {"hidden": 16, "dropout": 0.0},
        "inner": {"passes": 30, "gnn_lr": 0.02},
        "outer": {"epochs": 3, "steps": 4, "lr": 2e-2},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return DistillConfig.from_dict(values)


@pytest.fixture
def run(make_encoder, make_pool):
    """run(config, parts or tag) -> the synthetic TAG and the encoder."""

    def start(config, parts=2, callbacks=()):
        encoder = make_encoder(adapters=config.encoder.adapters, dropout=config.encoder.dropout)
        pool = make_pool(encoder, parts, **dataclasses.asdict(config.kernel))
        return distill(pool, encoder, config, callbacks), pool, encoder

    return start


@pytest.mark.parametrize("init", ["random", "medoid", "two-stage"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_seed_fixes_the_result_and_another_one_changes_it(run, init, adapters):
    small = {"inner": {"passes": 10}, "outer": {"epochs": 2, "steps": 2}}
    config = settings(synthetic={"init": init}, encoder={"adapters": adapters}, **small)
    first, *_ = run(config)
    torch.rand(3)  # what others draw does not matter
    again, *_ = run(config)
    assert torch.equal(first.token_embeds, again.token_embeds)
    assert first.metrics["val_accuracy"] == again.metrics["val_accuracy"]
    other, *_ = run(dataclasses.replace(config, seed=1))
    assert not torch.equal(first.token_embeds, other.token_embeds)


def test_every_stage_of_a_validation_is_told(run):
    """Before it runs; not its end, which something else follows at once."""
    told = Callback()
    told.found = []
    told.progress = lambda stage, *at: stage == "validate" and told.found.append(at)
    run(settings(outer={"epochs": 1}), callbacks=[told])
    assert told.found == 2 * [(0, 2, {}), (1, 2, {})]


def test_a_graph_without_validation_nodes_is_refused(run, tags, monkeypatch):
    monkeypatch.setitem(tags[2].meta["split_sizes"], "val", 0)
    with pytest.raises(DataError, match="no labelled node is in the val split"):
        run(settings())


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("learn_labels", [False, True])
def test_the_outer_steps_lower_the_loss(run, loss, learn_labels):
    config = settings(outer={"loss": loss, "patience": 9}, synthetic={"learn_labels": learn_labels})
    synthetic, *_ = run(config)
    losses = [value for record in synthetic.metrics["history"] for value in record.get("loss", [])]
    assert len(losses) == 12
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("learn_labels", [False, True])
def test_labels_move_where_they_are_learned(run, monkeypatch, learn_labels):
    scores = iter([0.1, 0.9])  # what the steps have made is kept
    monkeypatch.setattr(PAGE, "student_accuracy", lambda *_: next(scores))
    synthetic, *_ = run(settings(synthetic={"learn_labels": learn_labels}, outer={"epochs": 1}))
    one_hot = torch.nn.functional.one_hot(synthetic.labels.argmax(1), 3).float()
    assert synthetic.labels.equal(one_hot) is not learn_labels


def test_the_real_texts_are_encoded_with_the_adapters_that_were_trained(make_encoder, make_pool, monkeypatch):
    config = settings(encoder={"adapters": True}, outer={"epochs": 1})
    encoder = make_encoder(adapters=True)
    pool, held = make_pool(encoder, 1, precision="float64"), []
    encode, validate = pool.encode, PAGE.student_accuracy

    def check(*given):
        assert all(np.array_equal(held[-1][name], value) for name, value in encoder.adapters().items())
        return validate(*given)

    monkeypatch.setattr(pool, "encode", lambda adapters, *rest: held.append(adapters) or encode(adapters, *rest))
    monkeypatch.setattr(PAGE, "student_accuracy", check)
    distill(pool, encoder, config)


def test_outer_steps_take_the_folds_in_turn_and_replay_their_dropout(make_encoder, make_pool, monkeypatch):
    outer = {"epochs": 2, "steps": 3, "dropout": True, "patience": 9}
    config = settings(encoder={"adapters": True, "dropout": 0.3}, outer=outer)
    encoder = make_encoder(adapters=True, dropout=0.3)
    steps, there, back = [], [], []
    call, embeds, inject = Objective.__call__, encoder.encode_embeds, encoder.inject

    def counted(self, h_s, y_s, temperature, step=0):
        steps.append(step)
        return call(self, h_s, y_s, temperature, step)

    def encoded(*given, dropout_seed=None, **more):
        there.append(dropout_seed)
        return embeds(*given, dropout_seed=dropout_seed, **more)

    def injected(*given, dropout_seed=None, **more):
        back.append(dropout_seed)
        return inject(*given, dropout_seed=dropout_seed, **more)

    monkeypatch.setattr(Objective, "__call__", counted)
    monkeypatch.setattr(encoder, "encode_embeds", encoded)
    monkeypatch.setattr(encoder, "inject", injected)
    distill(make_pool(encoder, 1, precision="float64"), encoder, config)
    assert steps == list(range(6))
    assert [seed for seed in there if seed is not None] == back
    assert len(set(back)) == 6


def state_of_ones():
    return DistillState(torch.ones(2, 3, 4), torch.ones(2, 3), torch.tensor(1.0, dtype=torch.float64))


def test_rates_and_decay_are_those_of_each_parameter():
    """Adam's first step is its rate, whatever the gradient; without one it only decays."""
    state = state_of_ones()
    OuterOptimizer(state, 0.1, 0.2, 0.3, 0.5).step(torch.zeros(2, 3, 4), torch.zeros(2, 3), 0.0)
    for value, expected in ((state.x_s, 1 - 0.1 * 0.5), (state.y_s, 1.0), (state.log_temperature, 1.0)):
        torch.testing.assert_close(value, torch.full_like(value, expected))
    state = state_of_ones()
    OuterOptimizer(state, 0.1, 0.2, 0.3, 0.0).step(torch.ones(2, 3, 4), torch.ones(2, 3), 1.0)
    for value, rate in ((state.x_s, 0.1), (state.y_s, 0.2), (state.log_temperature, 0.3)):
        torch.testing.assert_close(value, torch.full_like(value, 1 - rate))


def test_the_best_set_is_a_copy():
    state = state_of_ones()
    assert state.offer(0.5)
    state.x_s += 1
    state.y_s += 1
    assert all(bool((kept == 1).all()) for kept in state.best)


def test_the_sharding_does_not_change_the_result(run):
    """Up to rounding, which the optimiser carries along: 1, 2 and 7 shards."""
    config = settings(outer={"patience": 9})
    whole, *_ = run(config, 1)
    for parts in (2, 7):
        sharded, *_ = run(config, parts)
        torch.testing.assert_close(sharded.token_embeds, whole.token_embeds, atol=2e-4, rtol=1e-3)
        assert [r["val_accuracy"] for r in sharded.metrics["history"]] == [
            r["val_accuracy"] for r in whole.metrics["history"]
        ]


def test_the_sharding_does_not_change_the_encodings_of_two_stages(run):
    """Many tokens produce the same encodings, and which of them inversion finds, rounding may decide."""
    two = {"token_steps": 300, "token_error": 1e-4}
    config = settings(synthetic={"init": "two-stage"}, two_stage=two, outer={"epochs": 0})
    (whole, _, encoder), (sharded, *_) = run(config, 1), run(config, 7)
    one, other = (encoder.encode_embeds(each.token_embeds) for each in (whole, sharded))
    assert (one - other).square().sum() < 4.1e-4 * one.square().sum()
    torch.testing.assert_close(sharded.labels, whole.labels, atol=1e-4, rtol=1e-3)


def test_the_result_is_the_set_that_validated_best(run, monkeypatch):
    """Validation is told to prefer epoch 1: the result is what distill(epochs=1) ends with, not the last set."""
    scores = iter([0.2, 0.9, 0.5, 0.5])
    monkeypatch.setattr(PAGE, "student_accuracy", lambda *_: next(scores))
    best, *_ = run(settings(outer={"epochs": 3, "patience": 9}))
    assert best.metrics["best_epoch"] == 1
    scores = iter([0.2, 0.9])
    last, *_ = run(settings(outer={"epochs": 1}))
    assert torch.equal(best.token_embeds, last.token_embeds)


def test_it_stops_when_validation_no_longer_improves(run, monkeypatch):
    monkeypatch.setattr(PAGE, "student_accuracy", lambda *_: 0.5)
    stopped, *_ = run(settings(outer={"epochs": 9, "patience": 2}))
    assert [r["epoch"] for r in stopped.metrics["history"]] == [0, 1, 2]


@pytest.mark.parametrize(("targets", "wanted"), [("labels", {"train", "val"}), ("teacher", {"train", "val", "all"})])
def test_the_test_split_is_never_asked_for(run, monkeypatch, targets, wanted):
    """A teacher speaks of every node; what it says does not depend on labels of test nodes, see below."""
    rows_of, asked = Partition.rows_of, set()
    monkeypatch.setattr(Partition, "rows_of", lambda part, split: (asked.add(split), rows_of(part, split))[1])
    run(settings(synthetic={"init": "two-stage"}, outer={"targets": targets}))
    assert asked == wanted


def test_labels_of_test_nodes_change_nothing(run, graph, prepare_graph):
    names = np.array(graph.nodes["label"].to_pylist())
    test = (graph.split == "test") & (graph.label >= 0)
    names[test] = np.roll(names[test], 1)
    nodes = graph.nodes.set_column(graph.nodes.column_names.index("label"), "label", pa.array(names))
    config = settings(synthetic={"init": "two-stage"}, outer={"targets": "teacher"})  # which speaks of every node
    plain, *_ = run(config, prepare_graph(graph))
    other, *_ = run(config, prepare_graph(dataclasses.replace(graph, nodes=nodes)))
    assert plain.config["dataset_hash"] != other.config["dataset_hash"]
    assert torch.equal(plain.token_embeds, other.token_embeds)
    assert torch.equal(plain.labels, other.labels)


def test_a_callback_sees_every_epoch_and_changes_nothing(run):
    class Count(Callback):
        epochs = 0

        def epoch(self, record):
            self.epochs += 1
            torch.rand(7)  # a callback that draws random numbers
            np.random.default_rng().random()

    count = Count()
    watched, *_ = run(settings(outer={"patience": 9}), callbacks=[count])
    plain, *_ = run(settings(outer={"patience": 9}))
    assert count.epochs == 4
    assert torch.equal(watched.token_embeds, plain.token_embeds)


def test_two_stages_reach_the_encodings_they_aim_at(make_encoder, make_pool):
    """Stage one lowers the loss; stage two's tokens encode to nearly what stage one found."""
    from talk_dist.runtime.teacher import RealSide
    from talk_dist.synthetic.init import initialise, optimise_encodings

    config = settings(
        synthetic={"init": "two-stage", "tokens": 16}, two_stage={"token_steps": 200}, outer={"targets": "labels"}
    )
    encoder = make_encoder()
    pool = make_pool(encoder, 2)
    errors = []
    start = initialise(
        RealSide(pool, config), encoder, config, lambda stage, i, n, m: errors.append(m.get("relative_error"))
    )
    assert errors[-1] < 0.1 * next(e for e in errors if e is not None)
    objective = Objective(pool, config)
    h_0 = encoder.encode_embeds(start.x_s)
    h_s = optimise_encodings(pool, h_0, start.y_s, config, lambda *_: None).h_s
    assert objective(h_s, start.y_s, 0.0).loss <= objective(h_0, start.y_s, 0.0).loss


def table(count, label):
    return pa.table({"node_id": np.arange(count), "text": [f"ash{i % 14} cedar{i % 5}" for i in range(count)],
                     "label": label})  # fmt: skip


EDGES = {
    "none": np.zeros((0, 2), np.int64),
    "one hub": np.stack([np.zeros(59, np.int64), np.arange(1, 60)], 1),
    "self-loops and repeats": np.repeat(np.stack([np.arange(60), np.arange(60)], 1), 2, 0),
    "a directed ring": np.stack([np.arange(60), (np.arange(60) + 1) % 60], 1),
}


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("kernel", [{"propagation": "sym", "hops": 1}, {"hops": 3, "layers": 2, "norms": "exact"}])
def test_any_graph_can_be_distilled(run, prepare_graph, edges, kernel):
    class Toy:
        nodes = table(60, np.arange(60) % 3)

    Toy.edges = pa.table({"src": EDGES[edges][:, 0], "dst": EDGES[edges][:, 1]})
    synthetic, *_ = run(settings(kernel=kernel), prepare_graph(Toy, parts=2))
    assert torch.isfinite(synthetic.token_embeds).all()
    assert len(synthetic) == 7


def test_fewer_synthetic_nodes_than_classes_is_refused(run):
    with pytest.raises(ConfigError, match=r"2 nodes for 3 classes.*--synthetic.size 3"):
        run(settings(synthetic={"size": 2}))


def test_a_loss_that_is_not_finite_is_an_error(run):
    with pytest.raises(ConfigError, match=r"diverged.*lower inner\.gnn_lr"):
        run(settings(inner={"gnn_lr": 1e30}))
