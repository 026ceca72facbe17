"""However the graph is cut into shards and rows into chunks: the mathematics is that of the dense whole."""

import errno
import gc
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import reference
import torch
from torch.nn.functional import cross_entropy

from talk_dist.config import DistillConfig, KernelConfig, OuterConfig, StudentConfig
from talk_dist.errors import ConfigError, DataError
from talk_dist.models.gnn import Student, local_graph
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime import chunks, propagate, student_pass
from talk_dist.runtime import shard as shard_module
from talk_dist.runtime.boundary import LossSpec, StudentState
from talk_dist.runtime.fields import Fields
from talk_dist.runtime.outer import Objective, accuracy
from talk_dist.runtime.pool import LocalPool

PARTS = (1, 2, 7, 20)  # 20 parts of 60 nodes: some have no training node at all
MATHEMATICS = [  # hops, layers, propagation, norms, loss
    *[(1, 1, "mean", "exact", "mse"), (1, 2, "sym", "exact", "ce"), (2, 1, "mean", "exact", "ce")],
    (2, 1, "mean", "linear", "mse"),
    (2, 2, "sym", "exact", "mse"),
    (3, 1, "mean", "exact", "ce"),
    (3, 2, "sym", "exact", "ce"),
]


@pytest.fixture(scope="module")
def synthetic():
    """h_s (M, d), soft y_s (M, C) and a log temperature, none of them special."""
    rng = np.random.default_rng(5)
    h_s = torch.from_numpy(0.6 * rng.normal(size=(9, 8)))
    return h_s, torch.from_numpy(rng.dirichlet(np.ones(3), 9)), 0.7


def objective_of(pool, kind, ridge=1e-2, targets="labels"):
    kernel = replace(pool.shards[0].spec.kernel, ridge=ridge)
    return Objective(pool, DistillConfig(kernel=kernel, outer=OuterConfig(loss=kind, targets=targets)))


def dense_encodings(graph, encoder, tags):
    """H (N, d) in the order of the node table."""
    return torch.from_numpy(encoder.encode_tokens(tags[1].partition(0).tokens))


def confusion(true, predicted):
    return np.bincount(3 * true + predicted, minlength=9).reshape(3, 3)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("hops", "layers", "propagation", "norms", "loss"), MATHEMATICS)
def test_objective_is_autograd_of_the_dense_whole(
    graph, tags, table_encoder, make_pool, synthetic, parts, hops, layers, propagation, norms, loss
):
    """Loss and gradients with respect to encodings, labels and temperature, summed over shards, in float64."""
    encoder = table_encoder()
    pool = make_pool(encoder, parts, hops=hops, layers=layers, propagation=propagation, norms=norms)
    mine = objective_of(pool, loss)(*synthetic)

    h_s, y_s = (tensor.clone().requires_grad_() for tensor in synthetic[:2])
    log_t = torch.tensor(synthetic[2], dtype=torch.float64, requires_grad=True)
    p, h_t = reference.propagation(graph.adjacency, propagation), dense_encodings(graph, encoder, tags)
    _, every_norm = reference.joint_ntk(p, h_t, h_s.detach(), hops, layers, norms)
    rows = graph.rows("train")
    k_ts = reference.kernel_ts(p, h_t, h_s, [n[: len(h_t)] for n in every_norm], layers)[rows]
    truth = reference.krr_loss(
        reference.kernel_ss(h_s, hops, layers), k_ts, y_s, torch.from_numpy(graph.label[rows]), 1e-2, loss, log_t
    )
    expected = torch.autograd.grad(truth, [h_s, y_s, log_t], materialize_grads=True)

    assert mine.loss == pytest.approx(truth.item(), rel=1e-11)
    torch.testing.assert_close(mine.d_hs, expected[0], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(mine.d_ys, expected[1], rtol=1e-8, atol=1e-11)
    assert mine.d_log_temperature == pytest.approx(expected[2].item(), rel=1e-9)


@pytest.fixture(scope="module")
def teacher():
    """A GCN that nobody trained."""
    return Student(StudentConfig(hidden=16), 8, 3, 1).eval()


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("propagation", "loss"), [("mean", "mse"), ("sym", "ce")])
def test_objective_with_a_teacher_is_autograd_of_the_dense_whole(
    graph, tags, table_encoder, make_pool, synthetic, teacher, parts, propagation, loss
):
    """All rows: training rows against their labels, others against what the teacher says of P^2 H of each by itself."""
    encoder = table_encoder()
    pool = make_pool(encoder, parts, propagation=propagation)
    pool.learn(StudentState.of(teacher))
    mine = objective_of(pool, loss, targets="teacher")(*synthetic)

    h_s, y_s = (tensor.clone().requires_grad_() for tensor in synthetic[:2])
    log_t = torch.tensor(synthetic[2], dtype=torch.float64, requires_grad=True)
    p, h_t = reference.propagation(graph.adjacency, propagation), dense_encodings(graph, encoder, tags)
    alone = torch.eye(len(h_t), dtype=torch.float64)
    said = reference.student(teacher, p @ p @ h_t, alone).softmax(1)
    said[graph.rows("train")] = torch.eye(3, dtype=said.dtype)[graph.label[graph.rows("train")]]
    _, every_norm = reference.joint_ntk(p, h_t, h_s.detach(), 2, 1)
    k_ts = reference.kernel_ts(p, h_t, h_s, [n[: len(h_t)] for n in every_norm], 1)
    truth = reference.krr_loss(reference.kernel_ss(h_s, 2, 1), k_ts, y_s, said, 1e-2, loss, log_t)
    expected = torch.autograd.grad(truth, [h_s, y_s, log_t], materialize_grads=True)

    assert mine.loss == pytest.approx(truth.item(), rel=1e-5)  # the teacher works in float32
    torch.testing.assert_close(mine.d_hs, expected[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mine.d_ys, expected[1], rtol=1e-4, atol=1e-7)
    assert mine.d_log_temperature == pytest.approx(expected[2].item(), rel=1e-4)


def test_what_the_teacher_said_is_forgotten_with_the_encodings(make_encoder, make_pool):
    encoder = make_encoder(adapters=True)
    pool = make_pool(encoder, 2)
    pool.learn(StudentState.of(Student(StudentConfig(hidden=16), encoder.width, 3, 1)))
    assert not pool.encode(encoder.adapters())
    h_s = np.ones((3, encoder.width), np.float32)
    before = pool.loss_and_grads(h_s, np.ones((3, 3)), LossSpec("mse", targets="teacher"))
    assert before.num_rows == pool.tag.num_nodes
    encoder.load_adapters({name: value + 0.1 for name, value in encoder.adapters().items()})
    assert pool.encode(encoder.adapters())
    with pytest.raises(ConfigError, match="nobody has taught"):
        pool.loss_and_grads(h_s, np.ones((3, 3)), LossSpec("mse", targets="teacher"))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("hops", "layers", "propagation", "loss"), [(1, 1, "mean", "mse"), (2, 1, "mean", "ce"), (3, 2, "sym", "mse")]
)
def test_hops_before_the_layers_are_the_dense_kernel_of_propagated_rows(
    graph, prepare_graph, table_encoder, make_pool, synthetic, parts, hops, layers, propagation, loss
):
    """architecture "sgc": one round of layers on P^K H of nodes by themselves, with a halo of one hop for any K."""
    tag = prepare_graph(graph, parts=parts, halo_hops=1)
    encoder = table_encoder()
    pool = make_pool(encoder, tag, architecture="sgc", hops=hops, layers=layers, propagation=propagation)
    mine = objective_of(pool, loss)(*synthetic)

    h_s, y_s = (tensor.clone().requires_grad_() for tensor in synthetic[:2])
    log_t = torch.tensor(synthetic[2], dtype=torch.float64, requires_grad=True)
    whole = prepare_graph(graph, parts=1, halo_hops=1)
    p = torch.linalg.matrix_power(reference.propagation(graph.adjacency, propagation), hops)
    rows = graph.rows("train")
    z = (p @ torch.from_numpy(encoder.encode_tokens(whole.partition(0).tokens)))[rows]
    alone = torch.eye(len(z), dtype=torch.float64)
    _, every_norm = reference.joint_ntk(alone, z, h_s.detach(), 1, layers)
    k_ts = reference.kernel_ts(alone, z, h_s, [n[: len(z)] for n in every_norm], layers)
    truth = reference.krr_loss(
        reference.kernel_ss(h_s, 1, layers), k_ts, y_s, torch.from_numpy(graph.label[rows]), 1e-2, loss, log_t
    )
    expected = torch.autograd.grad(truth, [h_s, y_s, log_t], materialize_grads=True)
    assert mine.loss == pytest.approx(truth.item(), rel=1e-11)
    torch.testing.assert_close(mine.d_hs, expected[0], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(mine.d_ys, expected[1], rtol=1e-8, atol=1e-11)
    assert mine.d_log_temperature == pytest.approx(expected[2].item(), rel=1e-9, abs=1e-15)
    np.testing.assert_allclose(np.sort(pool.sample(99, 0).features, axis=0), np.sort(z, axis=0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["gcn", "sage", "sgc", "appnp", "gat"])
@pytest.mark.parametrize("targets", ["labels", "teacher"])
def test_a_students_gradient_is_autograd_on_propagated_rows_by_themselves(
    graph, tags, table_encoder, make_pool, teacher, kind, targets
):
    """In any sharding, by blocks and folds that add up; no other node is seen."""
    encoder, student = table_encoder(), Student(StudentConfig(kind=kind, hidden=16), 8, 3, 2).eval()
    p = reference.propagation(graph.adjacency, "mean")
    features = (p @ p @ dense_encodings(graph, encoder, tags)).float()
    wanted, rows = torch.from_numpy(graph.label).long(), graph.rows("train")
    if targets == "teacher":
        known = rows
        wanted, rows = teacher(features).softmax(1).detach(), np.arange(len(features))
        wanted[known] = torch.eye(3)[graph.label[known]]
    truth = cross_entropy(student(features[rows]), wanted[rows], reduction="sum")
    expected = torch.autograd.grad(truth, list(student.parameters()), materialize_grads=True)
    for parts in PARTS:
        pool = make_pool(encoder, parts, architecture="sgc")
        pool.learn(StudentState.of(teacher))
        shares = [LossSpec("ce", 0.0, targets, (fold, 3), (block, 2)) for fold in range(3) for block in range(2)]
        sums = [pool.student_grads(StudentState.of(student), share) for share in shares]
        assert sum(s.num_rows for s in sums) == len(rows)
        assert sum(s.loss for s in sums) == pytest.approx(truth.item(), rel=1e-5)
        for (name, _), value in zip(student.named_parameters(), expected, strict=True):
            found = sum(s.d_weights[name] for s in sums)
            np.testing.assert_allclose(found, value.numpy(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("architecture", ["gcn", "sgc"])
@pytest.mark.parametrize("targets", ["labels", "teacher"])
def test_folds_add_up_to_the_whole_and_do_not_depend_on_the_sharding(
    table_encoder, make_pool, synthetic, teacher, architecture, targets
):
    """Every row is in one fold; a fold is the same rows however the graph is cut."""
    h_s, dual = synthetic[0].numpy(), np.random.default_rng(1).normal(size=(9, 3))
    whole, of_parts = LossSpec("ce", 0.7, targets), []
    for parts in PARTS:
        pool = make_pool(table_encoder(), parts, architecture=architecture)
        pool.learn(StudentState.of(teacher))
        folds = [pool.loss_and_grads(h_s, dual, replace(whole, fold=(fold, 4))) for fold in range(4)]
        at_once = pool.loss_and_grads(h_s, dual, whole)
        assert all(0 < fold.num_rows < at_once.num_rows for fold in folds)
        for name in ("loss", "num_rows", "d_dual", "d_hs", "d_log_temperature"):
            np.testing.assert_allclose(sum(getattr(f, name) for f in folds), getattr(at_once, name), rtol=1e-10)
        of_parts.append(folds)
    for folds in of_parts[1:]:
        for one, other in zip(folds, of_parts[0], strict=True):
            assert one.num_rows == other.num_rows
            np.testing.assert_allclose(one.d_hs, other.d_hs, rtol=0, atol=1e-6 if targets == "teacher" else 1e-12)


def test_steps_take_the_folds_in_turn(table_encoder, make_pool, synthetic):
    """`outer.rows`: the mean over a turn of all folds is nearly the whole, and the next turn has the same folds."""
    objective = objective_of(make_pool(table_encoder(), 2), "mse")
    assert objective.folds(9) == 1
    turns = replace(objective, config=replace(objective.config, outer=OuterConfig(rows=16, targets="labels")))
    folds = turns.folds(9)
    losses = [turns(*synthetic, step).loss for step in range(2 * folds)]
    assert len(set(losses)) == folds > 1
    assert losses[:folds] == losses[folds:]
    assert np.mean(losses[:folds]) == pytest.approx(objective(*synthetic).loss, rel=0.2)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_gradient_is_the_finite_difference_of_the_loss(table_encoder, make_pool, synthetic, loss):
    """Central differences of the sharded loss itself, in random directions of h_s and y_s, and in the temperature."""
    objective = objective_of(make_pool(table_encoder(), 7), loss)
    h_s, y_s, log_t = synthetic
    gradient = objective(h_s, y_s, log_t)
    difference, rng = reference.directional_difference, np.random.default_rng(0)
    for _ in range(3):
        v, w = torch.from_numpy(rng.normal(size=h_s.shape)), torch.from_numpy(rng.normal(size=y_s.shape))
        slope = difference(lambda x: objective(x, y_s, log_t).loss, h_s, v)
        assert float((gradient.d_hs * v).sum()) == pytest.approx(slope, rel=1e-6)
        slope = difference(lambda y: objective(h_s, y, log_t).loss, y_s, w)
        assert float((gradient.d_ys * w).sum()) == pytest.approx(slope, rel=1e-6)
    slope = difference(lambda t: objective(h_s, y_s, t).loss, log_t, 1.0)
    assert gradient.d_log_temperature == pytest.approx(slope, rel=1e-6, abs=1e-12)


def test_every_way_to_shard_gives_the_same_sums_to_rounding(table_encoder, make_pool, synthetic):
    """To 1e-13 between 1, 2, 7 and 20 shards, more closely than any of them can follow dense truth."""
    objectives = [objective_of(make_pool(table_encoder(), parts), "ce") for parts in PARTS]
    gradients = [objective(*synthetic) for objective in objectives]
    assert torch.equal(objectives[2](*synthetic).d_hs, gradients[2].d_hs)  # and to the bit when asked again
    for other in gradients[1:]:
        assert other.loss == pytest.approx(gradients[0].loss, rel=1e-13)
        torch.testing.assert_close(other.d_hs, gradients[0].d_hs, rtol=0, atol=1e-13)
        torch.testing.assert_close(other.d_ys, gradients[0].d_ys, rtol=0, atol=1e-13)


def test_a_halo_no_larger_than_needed_suffices(graph, prepare_graph, table_encoder, make_pool, synthetic):
    """K hops need a halo of K - 1: a graph prepared with just that gives the same."""
    narrow = prepare_graph(graph, parts=7, halo_hops=1)
    wide = objective_of(make_pool(table_encoder(), 7), "ce")(*synthetic)
    assert objective_of(make_pool(table_encoder(), narrow), "ce")(*synthetic).loss == pytest.approx(
        wide.loss, rel=1e-13
    )


def test_single_precision_is_close_to_double(table_encoder, make_pool, synthetic):
    """kernel.precision = float32 changes digits, not results; h_s may come in either."""
    double = objective_of(make_pool(table_encoder(), 7), "ce")(*synthetic)
    pool = make_pool(table_encoder(dtype=np.float32), 7, precision="float32")
    h_s, y_s, log_t = synthetic
    single = objective_of(pool, "ce")(h_s.float(), y_s.float(), log_t)
    assert pool.shards[0].dtype == torch.float32
    assert single.loss == pytest.approx(double.loss, rel=1e-4)
    error = (single.d_hs - double.d_hs).norm() / double.d_hs.norm()
    assert 0 < error < 1e-3


@pytest.mark.parametrize("parts", [1, 7])
def test_rows_in_chunks_are_rows_at_once(monkeypatch, graph, table_encoder, make_pool, synthetic, parts):
    """A memory limit below one row makes every training row a chunk of its own and changes rounding only."""
    blocks = []
    original = shard_module.KernelBlock
    monkeypatch.setattr(shard_module, "KernelBlock", lambda *a: blocks.append(1) or original(*a))
    pool = make_pool(table_encoder(), parts, hops=3)
    whole, counts = objective_of(pool, "ce")(*synthetic), objective_of(pool, "ce").krr_counts(*synthetic[:2], "test")
    at_once = len(blocks)
    monkeypatch.setattr(chunks, "LIVE_BUFFERS", 1 << 30)
    pool = make_pool(table_encoder(), parts, hops=3, chunk_mib=1)
    chunked = objective_of(pool, "ce")(*synthetic)
    assert at_once <= 2 * parts
    assert len(blocks) - at_once == len(graph.rows("train"))
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-13)
    torch.testing.assert_close(chunked.d_hs, whole.d_hs, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(objective_of(pool, "ce").krr_counts(*synthetic[:2], "test"), counts)


@pytest.mark.parametrize("parts", PARTS)
def test_kernel_predictions_are_counted_as_on_the_whole(graph, tags, table_encoder, make_pool, synthetic, parts):
    """Confusion counts [true, predicted] of every split, over labelled nodes only."""
    encoder = table_encoder()
    h_s, y_s, _ = synthetic
    objective = objective_of(make_pool(encoder, parts), "mse")
    p, h_t = reference.propagation(graph.adjacency, "mean"), dense_encodings(graph, encoder, tags)
    whole, _ = reference.joint_ntk(p, h_t, h_s, 2, 1)
    k_ss, n = whole[len(h_t) :, len(h_t) :], len(h_s)
    ridge = 1e-2 * k_ss.trace() / n * torch.eye(n, dtype=k_ss.dtype)
    predicted = (whole[: len(h_t), len(h_t) :] @ torch.linalg.solve(k_ss + ridge, y_s)).argmax(1).numpy()
    for split in ("train", "val", "test"):
        rows = graph.rows(split)
        counts = objective.krr_counts(h_s, y_s, split)
        np.testing.assert_array_equal(counts, confusion(graph.label[rows], predicted[rows]))
        assert accuracy(counts) == pytest.approx((predicted == graph.label)[rows].mean())
    assert len(np.unique(predicted)) == 3


@pytest.mark.parametrize(
    ("kind", "propagation"),
    [*((kind, "auto") for kind in ("gcn", "sage", "sgc", "appnp", "gat")), ("gcn", "mean"), ("sage", "sym")],
)
def test_students_on_shards_are_the_student_on_the_whole_graph(
    graph, tags, table_encoder, make_pool, kind, propagation
):
    """One halo exchange a layer gives the logits of `forward` on the whole graph, and both those of dense algebra."""
    encoder = table_encoder(dtype=np.float32)
    config = StudentConfig(kind=kind, hidden=16, depth=2 if kind == "gcn" else 3, propagation=propagation)
    student = Student(config, encoder.width, 3, seed=2).eval()
    h, whole = dense_encodings(graph, encoder, tags), local_graph(config, *graph.csr())
    biases = [weight.data for name, weight in student.named_parameters() if "bias" in name]
    for bias in biases:  # torch-geometric starts them at zero: then nothing would see them
        bias += torch.linspace(-0.1, 0.1, len(bias))
    biases[-1] -= student(h, whole).detach().mean(0)  # so that no class takes all
    logits = student(h, whole).detach()
    truth = reference.student(student, h.double(), graph.adjacency)
    torch.testing.assert_close(logits.double(), truth, rtol=1e-4, atol=1e-5)
    predicted = logits.argmax(1).numpy()
    assert len(np.unique(predicted)) == 3
    for parts in PARTS:
        pool = make_pool(encoder, parts)
        for split in ("val", "train"):
            mine, rows = pool.student_scores(shard_module.StudentState.of(student), split), graph.rows(split)
            np.testing.assert_array_equal(mine, confusion(graph.label[rows], predicted[rows]))
        for shard in pool.shards:  # not only the winning class: every number
            own = torch.from_numpy(shard._fields["X"][: shard.part.num_own])
            torch.testing.assert_close(own, logits[torch.from_numpy(shard.part.node.copy())], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_class", [3, 100])
def test_samples_are_the_same_nodes_in_the_same_order(graph, tags, table_encoder, make_pool, per_class):
    """Chosen by the hash of their id, whatever the sharding; with P^2 H as features, and their own texts."""
    encoder, p = table_encoder(), reference.propagation(graph.adjacency, "mean")
    smoothed = (p @ p @ dense_encodings(graph, encoder, tags)).numpy()
    texts = tags[1].partition(0).tokens
    chosen = []
    for parts in PARTS:
        pool = make_pool(encoder, parts, hops=1)
        sample = pool.sample(per_class, seed=3)
        node = np.array([pool.shards[shard].part.node[row] for shard, row in sample.place])
        np.testing.assert_array_equal(graph.label[node], sample.label)
        np.testing.assert_allclose(sample.features, smoothed[node], rtol=1e-5, atol=1e-6)
        tokens = pool.tokens(sample.place)
        assert all(np.array_equal(tokens[i], texts[row]) for i, row in enumerate(node))
        chosen.append(node.tolist())
        assert pool.sample(per_class, seed=4).place.tolist() != sample.place.tolist()  # the seed counts
    assert all(nodes == chosen[0] for nodes in chosen)
    train = graph.rows("train")
    available = np.bincount(graph.label[train], minlength=3)
    np.testing.assert_array_equal(np.bincount(graph.label[chosen[0]], minlength=3), np.minimum(per_class, available))
    assert len(set(chosen[0]) & set(train.tolist())) == len(chosen[0])


def test_permuting_the_nodes_permutes_nothing_but_the_order(graph, prepare_graph, table_encoder, make_pool, synthetic):
    """Nodes and edges in another order, edges turned round and repeated: same loss, gradient, sample and students."""
    encoder = table_encoder(dtype=np.float32)
    shuffled = graph.permuted(seed=4)
    student = shard_module.StudentState.of(Student(StudentConfig(hidden=16), encoder.width, 3, seed=0))
    results = []
    for which in (graph, shuffled):
        pool = make_pool(encoder, prepare_graph(which, parts=3))
        sample = pool.sample(4, 0)
        node_id = [pool.shards[shard].part.node_id[int(row)].as_py() for shard, row in sample.place]
        results.append((objective_of(pool, "ce")(*synthetic), node_id, pool.student_scores(student, "val")))
    (one, ids, counts), (two, other_ids, other_counts) = results
    assert two.loss == pytest.approx(one.loss, rel=1e-12)
    torch.testing.assert_close(two.d_hs, one.d_hs, rtol=0, atol=1e-12)
    torch.testing.assert_close(two.d_ys, one.d_ys, rtol=0, atol=1e-12)
    assert other_ids == ids
    np.testing.assert_array_equal(other_counts, counts)


def test_each_text_is_encoded_once_and_only_for_new_adapters(graph, tags, table_encoder, make_pool):
    """By the shard that owns it: halo rows travel as encodings. The same adapters again are no work at all."""
    encoder = table_encoder()
    pool = make_pool(encoder, 7)
    assert encoder.encoded == len(graph.label)
    pool.encode({})
    assert encoder.encoded == len(graph.label)


def test_new_adapters_encode_again_and_change_the_loss(make_encoder, make_pool, synthetic):
    """The real encoder with adapters: other weights, other encodings, everywhere, halos too."""
    encoder = make_encoder(adapters=True)
    pool = make_pool(encoder, 2)
    h_s, y_s = torch.randn(9, encoder.width, generator=torch.Generator().manual_seed(0)), synthetic[1]
    before = objective_of(pool, "ce")(h_s, y_s, 0.0)
    moved = {name: value + 0.3 for name, value in encoder.adapters().items()}
    pool.encode(moved)
    after = objective_of(pool, "ce")(h_s, y_s, 0.0)
    encoder.load_adapters(moved)
    fresh = objective_of(make_pool(encoder, 1), "ce")(h_s, y_s, 0.0)
    assert after.loss == pytest.approx(fresh.loss, rel=1e-5)
    assert abs(after.loss - before.loss) > 1e-3 * before.loss


def test_encodings_are_kept_beside_the_prepared_tag(graph, prepare_graph, make_encoder, make_pool, monkeypatch):
    """A second pool of a frozen encoder reads them and encodes nothing; adapters and cache=False leave no file."""
    tag = prepare_graph(graph, parts=2)
    folder = Path(tag.path) / "encodings"
    make_pool(make_encoder(), tag, cache=False)
    make_pool(make_encoder(adapters=True), tag, cache=True)
    assert not folder.exists()
    first = make_pool(make_encoder(), tag, cache=True)
    assert len(list(folder.iterdir())) == 2
    encoder = make_encoder()
    monkeypatch.setattr(encoder, "encode_tokens", lambda *_: pytest.fail("encoded again"))
    second = make_pool(encoder, tag, cache=True)
    for one, two in zip(first.shards, second.shards, strict=True):
        np.testing.assert_array_equal(one._fields["H"], two._fields["H"])


def test_encodings_that_cannot_be_kept_are_used_all_the_same(
    graph, prepare_graph, make_encoder, make_pool, monkeypatch
):
    """A prepared graph may lie where nothing can be written."""

    def refuse(uri, data):
        raise OSError(errno.EROFS, "Read-only file system", uri)

    tag = prepare_graph(graph)
    with monkeypatch.context() as patched:
        patched.setattr("talk_dist.data.storage.write_atomic", refuse)
        with pytest.warns(UserWarning, match=r"cannot be kept there \(.*Read-only.*--runtime\.cache_folder"):
            found = make_pool(make_encoder(), tag, cache=True)
    expected = make_pool(make_encoder(), tag, cache=False)
    np.testing.assert_array_equal(found.shards[0]._fields["H"], expected.shards[0]._fields["H"])


def test_kept_encodings_that_are_damaged_are_computed_again(graph, prepare_graph, make_encoder, make_pool):
    tag = prepare_graph(graph)
    expected = make_pool(make_encoder(), tag, cache=True)
    (kept,) = (Path(tag.path) / "encodings").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-9])
    found = make_pool(make_encoder(), tag, cache=True)
    np.testing.assert_array_equal(found.shards[0]._fields["H"], expected.shards[0]._fields["H"])
    assert kept.read_bytes() == whole


def test_kept_encodings_of_other_texts_or_another_encoder_are_not_used(graph, prepare_graph, make_encoder, make_pool):
    """An object store keeps the folder of encodings when the graph is prepared again: their name must tell."""
    nodes = graph.nodes.set_column(1, "text", pa.array(graph.nodes["text"].to_pylist()[::-1]))
    tag, again = prepare_graph(graph), prepare_graph(replace(graph, nodes=nodes))
    make_pool(make_encoder(), tag, cache=True)
    shutil.copytree(Path(tag.path) / "encodings", Path(again.path) / "encodings")
    for encoder in (make_encoder(), make_encoder(pooling="cls")):
        kept, fresh = make_pool(encoder, again, cache=True), make_pool(encoder, again, cache=False)
        np.testing.assert_array_equal(kept.shards[0]._fields["H"], fresh.shards[0]._fields["H"])


def test_splits_of_a_graph_share_a_folder_of_encodings(graph, prepare_graph, make_encoder, monkeypatch, tmp_path):
    """Other splits, the same texts: encoded once."""
    tags = [prepare_graph(graph, parts=2, use_split_column=False, split_seed=seed) for seed in (0, 1)]
    assert tags[0].meta["hash"] != tags[1].meta["hash"]
    encoder, runtime = make_encoder(), RuntimeConfig(cache_folder=str(tmp_path))
    LocalPool(tags[0], encoder, KernelConfig(), runtime).encode({})
    monkeypatch.setattr(encoder, "encode_tokens", lambda *_: pytest.fail("encoded again"))
    LocalPool(tags[1], encoder, KernelConfig(), runtime).encode({})


def test_another_tokenizer_is_refused(tags, table_encoder, encoder_folder, other_encoder_folder):
    """The message names both encoders and the remedy."""
    encoder = table_encoder(name=other_encoder_folder)
    message = f"tokenised for encoder '{encoder_folder}' .* '{other_encoder_folder}' .*prepare it again with --encoder"
    with pytest.raises(DataError, match=message):
        LocalPool(tags[1], encoder, KernelConfig(), RuntimeConfig())


def test_hops_beyond_the_halo_are_refused_with_the_remedy(graph, prepare_graph, table_encoder, make_pool):
    """A halo of h serves h + 1 hops, for one part as for many."""
    tag = prepare_graph(graph, parts=2, halo_hops=1)
    make_pool(table_encoder(), tag, hops=2)
    with pytest.raises(ConfigError, match=r"kernel\.hops = 3, but .* halos for 2 hops; .*--halo_hops 2"):
        make_pool(table_encoder(), tag, hops=3)


@pytest.mark.parametrize("architecture", ["gcn", "sgc"])
@pytest.mark.parametrize("parts", [1, 7])
def test_blocks_are_kernels_of_their_own_rows(
    monkeypatch, graph, prepare_graph, table_encoder, make_pool, synthetic, parts, architecture
):
    """Loss and gradients of B blocks are those of B small problems on their shares of the rows, which part them."""
    monkeypatch.setattr(KernelConfig, "blocks", lambda self, m: 3 if m == 9 else 1)
    h_s, y_s, log_t = synthetic
    pool = make_pool(table_encoder(), parts, architecture=architecture)
    objective = objective_of(pool, "ce")
    found = objective(h_s, y_s, log_t)
    shards, rows = pool.shards, graph.rows("train")
    shares = [[shard._chunks.rows("train", (block, 3), (0, 1)) for shard in shards] for block in range(3)]
    ids = [np.concatenate([s.part.node[r] for s, r in zip(shards, share, strict=True)]) for share in shares]
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), rows)
    monkeypatch.setattr("talk_dist.runtime.outer.loss_scale", lambda *_: 1 / len(rows))
    loss = 0.0
    for block in range(3):
        with monkeypatch.context() as alone:
            alone.setattr(chunks.Chunks, "rows", lambda self, *_, b=block: shares[b][self._part.index])
            small = objective_of(make_pool(table_encoder(), parts, architecture=architecture), "ce")
            one = small(h_s[block::3], y_s[block::3], log_t)
        loss += one.loss
        torch.testing.assert_close(found.d_hs[block::3], one.d_hs, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found.d_ys[block::3], one.d_ys, rtol=1e-10, atol=1e-13)
    assert found.loss == pytest.approx(loss, rel=1e-12)


def test_the_share_of_a_block_does_not_depend_on_sharding_or_folds(table_encoder, make_pool):
    """A row stays in its block whatever the number of folds, and folds part it."""
    of_parts = []
    for parts in (1, 7):
        pool = make_pool(table_encoder(), parts)

        def ids(block, fold, pool=pool):
            rows = [(s.part.node, s._chunks.rows("train", block, fold)) for s in pool.shards]
            return {int(i) for node, r in rows for i in node[r]}

        blocks = [ids((b, 3), (0, 1)) for b in range(3)]
        assert all(blocks)
        for b, whole in enumerate(blocks):
            folds = [ids((b, 3), (f, 4)) for f in range(4)]
            assert set.union(*folds) == whole
            assert sum(map(len, folds)) == len(whole)
        of_parts.append(blocks)
    assert of_parts[0] == of_parts[1]


@pytest.mark.parametrize("kind", ["gcn", "sage", "sgc", "appnp", "gat"])
@pytest.mark.parametrize("fields", ["memory", "disk"])
def test_students_and_hops_in_pieces_are_the_whole(
    monkeypatch, tmp_path, graph, table_encoder, make_pool, kind, fields
):
    """With room for a few columns, edges and nodes at once: the same fields and the same logits, to rounding; from disk
    to half precision."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if fields == "memory" else {"rtol": 5e-3, "atol": 5e-3}
    student = StudentState.of(Student(StudentConfig(kind=kind, hidden=16), 8, 3, 1).eval())
    whole = make_pool(table_encoder(dtype=np.float32), 2, architecture="sgc", precision="float32")
    whole.student_scores(student, "val")
    monkeypatch.setattr(propagate, "PROPAGATED_BYTES", 400)
    monkeypatch.setattr(propagate, "PROPAGATED_ENTRIES", 20)
    monkeypatch.setattr(propagate, "READ_ROWS", 7)
    monkeypatch.setattr(student_pass, "STAGE_BYTES", 9000)
    kernel = {"architecture": "sgc", "precision": "float32", "fields": fields}
    pieces = make_pool(table_encoder(dtype=np.float32), 2, **kernel)
    pieces.student_scores(student, "val")
    for one, other in zip(whole.shards, pieces.shards, strict=True):
        assert isinstance(other._fields["Z"], np.memmap) == (fields == "disk")
        assert len(list(other.part.stretches(20))) > 3
        for name in ("H", "P1", "Z", "X"):
            own = slice(0, one.part.num_own)
            np.testing.assert_allclose(other._fields[name][own], one._fields[name][own], **tolerance)


def test_fields_on_disk_are_where_they_are_asked_for_and_leave_nothing(tmp_path, graph, prepare_graph, table_encoder):
    """However the process ends: they have no name."""
    tag = prepare_graph(graph, parts=1)
    kernel, runtime = KernelConfig(fields="disk"), RuntimeConfig(cache=False, scratch=str(tmp_path))
    pool = LocalPool(tag, table_encoder(dtype=np.float32), kernel, runtime)
    pool.encode({})

    def mapped():
        return Path("/proc/self/maps").read_text().count(f" {tmp_path}/")

    assert (mapped(), list(tmp_path.iterdir())) == (3, [])  # H, P1 and Z
    del pool
    gc.collect()
    assert not mapped()


def test_fields_that_the_disk_has_no_room_for(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk, but only for this process
    try:
        with pytest.raises(ConfigError, match=rf"scratch = '{tmp_path}': no place for the 8,000 bytes .*\(File too"):
            Fields(1000, disk=True, scratch=str(tmp_path)).blank("H", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ConfigError, match=r"scratch = '.*/gone': no place .*\(No such file or directory\)"):
        Fields(1000, disk=True, scratch=f"{tmp_path}/gone").blank("H", 4)


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    fields = Fields(3, disk=True, scratch=str(tmp_path))
    fields.blank("H", 2)
    with pytest.raises(ConfigError, match=r'kernel\.fields = "disk": field H has the value 7e\+04.*set kernel\.fields'):
        fields.put("H", slice(0, 1), slice(None), np.array([[1.0, -7e4]]))


# -- pieces, and ends in between ------------------------------------------------------------------------------


def test_sums_in_pieces_are_those_at_once(table_encoder, make_pool, monkeypatch):
    teacher, student = (StudentState.of(Student(StudentConfig(hidden=16), 8, 3, seed).eval()) for seed in (1, 2))
    rng, found = np.random.default_rng(0), []
    h_s, dual, loss = rng.normal(size=(9, 8)), rng.normal(size=(9, 3)), LossSpec("ce", targets="teacher")
    for small in (False, True):
        if small:
            for name, rows in (("SUMMED_ROWS", 5), ("ALONE_ROWS", 2), ("MEASURED_ENTRIES", 20)):
                monkeypatch.setattr(shard_module, name, rows)
            monkeypatch.setattr(chunks, "TILE_ROWS", 4)
            monkeypatch.setattr(chunks, "TILE_ELEMENTS", 1)
        pool = make_pool(table_encoder(), 2, architecture="sgc")
        pool.learn(teacher)
        kernel, alone = pool.loss_and_grads(h_s, dual, loss), pool.student_grads(student, loss)
        found.append([kernel.loss, kernel.d_dual, kernel.d_hs, alone.loss, *alone.d_weights.values()])
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", ["texts", "shards", "exchange"])
def test_an_encoding_that_broke_off_is_taken_for_no_other(make_encoder, make_pool, monkeypatch, end):
    """Between the texts of a shard, between shards, or before neighbours have their rows: neither for the one before
    nor for the one that it was to be."""
    monkeypatch.setattr(shard_module, "ENCODED_ROWS", 20)
    encoder = make_encoder(adapters=True)
    pool = make_pool(encoder, 1 if end == "texts" else 2)
    old = encoder.adapters()
    new = {name: value + 0.3 for name, value in old.items()}

    def fields():
        return [shard._fields[name].copy() for shard in pool.shards for name in ("H", "Z")]

    expected = {"old": fields()}
    pool.encode(new)
    expected["new"] = fields()
    pool.encode(old)
    place, name = (pool, "_exchange") if end == "exchange" else (encoder, "encode_tokens")
    for then, adapters in (("old", old), ("new", new)):
        calls, action = [], getattr(place, name)

        def stop(*given, calls=calls, action=action):
            calls.append(1)
            if len(calls) == (1 if end == "exchange" else 2):
                raise KeyboardInterrupt
            return action(*given)

        with monkeypatch.context() as patched:
            patched.setattr(place, name, stop)
            with pytest.raises(KeyboardInterrupt):
                pool.encode(new)
        pool.encode(adapters)
        for one, two in zip(fields(), expected[then], strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
        pool.encode(old)


@pytest.mark.parametrize("architecture", ["sgc", "gcn"])
def test_a_chunk_s_block_fits_its_memory(table_encoder, make_pool, architecture):
    shard = make_pool(table_encoder(), 1, architecture=architecture, chunk_mib=1, precision="float32").shards[0]
    columns = (1 << 20) // (4 * chunks.LIVE_BUFFERS) // 5  # five rows of it
    cut = shard._chunks.of("train", columns)
    assert max(len(chunk.rows) for chunk in cut) <= 5
    assert sum(len(chunk.rows) for chunk in cut) == len(shard.part.rows_of("train"))
