"""Graphs whose nodes bring encodings in place of texts: what is checked, kept, distilled and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from talk_dist.commands.preflight import planned
from talk_dist.config import DistillConfig, EncoderConfig, InnerConfig, KernelConfig, StudentConfig
from talk_dist.data import storage
from talk_dist.data.given import load_encodings
from talk_dist.data.prepare import prepare
from talk_dist.data.tables import Source, Table, from_arrow, open_tables
from talk_dist.data.tag import PreparedTag, content_hash
from talk_dist.data.validate import validate
from talk_dist.distill import distill
from talk_dist.errors import ConfigError, DataError
from talk_dist.models.encoder import load_encoder
from talk_dist.models.given import GivenEncoder
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.pool import LocalPool
from talk_dist.runtime.teacher import RealSide
from talk_dist.synthetic.coresets import class_centres, sample_for
from talk_dist.synthetic.init import class_counts, initialise, one_hot_labels, optimise_encodings
from talk_dist.training_sets import coreset_tag

WIDTH = 8


def vectors(count, width=WIDTH, seed=3):
    return np.random.default_rng(seed).normal(size=(count, width))


def column(x, kind=None):
    """Rows of ``x`` as an Arrow column: ``kind`` of list and float, by default fixed_size_list<float>."""
    return pa.array(x.tolist(), kind or pa.list_(pa.float32(), x.shape[1]))


def with_encodings(graph, x, kind=None):
    """The tables of a toy graph, its texts replaced by the rows of ``x``."""
    return graph.nodes.drop_columns(["text"]).append_column("encoding", column(x, kind)), graph.edges


@pytest.fixture(scope="module")
def features(graph):
    """(N, d) by class, so that there is something to learn."""
    return vectors(len(graph.label)) + 1.5 * vectors(4, seed=4)[graph.label]


@pytest.fixture(scope="module")
def given_tags(graph, features, tmp_path_factory):
    """parts -> the toy graph with ``features`` for texts, prepared in so many parts."""
    source, root = from_arrow(*with_encodings(graph, features)), tmp_path_factory.mktemp("given")
    return {n: prepare(source, root / str(n), parts=n, method="hash", halo_hops=2) for n in (1, 3, 7)}


def by_id(tag):
    """node_id -> encoding."""
    parts = [tag.partition(index) for index in range(tag.num_parts)]
    return {i: x for part in parts for i, x in zip(part.node_id.to_pylist(), part.encodings, strict=True)}


# -- prepare ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_encodings_come_back_in_the_order_of_own_nodes(graph, features, given_tags, parts):
    tag = given_tags[parts]
    found, ids = by_id(tag), graph.nodes["node_id"].to_pylist()
    assert np.array_equal(np.stack([found[i] for i in ids]), features.astype(np.float32).astype(np.float16))
    part = tag.partition(0)
    assert isinstance(part.encodings, np.memmap)
    assert not part.encodings.flags.writeable
    assert len(part.tokens) == part.num_own
    assert not len(part.tokens.values)
    assert tag.encoding_width == WIDTH


@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("make", [pa.list_, pa.large_list, lambda number: pa.list_(number, WIDTH)])
def test_every_kind_of_list_gives_the_same(tmp_path, graph, features, number, make):
    """In sliced batches, whose lists begin in the middle of their values."""
    x = features.astype(np.float16)
    nodes, edges = with_encodings(graph, x, make(number))
    batches = nodes.combine_chunks().to_batches(max_chunksize=7)
    table = Table("nodes", lambda: nodes.column_names, lambda want: iter([b.select(list(want)) for b in batches]))
    source = Source("toy", table, from_arrow(nodes, edges).edges)
    found = by_id(prepare(source, tmp_path / "tag", parts=2, method="hash"))
    assert np.array_equal(np.stack([found[i] for i in graph.nodes["node_id"].to_pylist()]), x)


def test_meta_says_what_the_encodings_are(graph, given_tags):
    tag = given_tags[3]
    meta, size = tag.meta, 2 * WIDTH
    counts = {"bytes": size * len(graph.label), "train_bytes": size * len(graph.rows("train"))}
    assert meta["encodings"] == {"width": WIDTH}
    assert meta["tokenizer"] == {"name": "given:8", "fingerprint": "given:8", "max_tokens": 1, "truncated": 0}
    assert meta["text"] == {**counts, "tokens": 0}
    for part in meta["parts"]:
        assert set(part["files"]) == {"nodes.parquet", "graph.safetensors", "encodings.npy"}


def test_texts_are_taken_where_there_are_both(tmp_path, graph, features, encoder_folder):
    nodes = graph.nodes.append_column("encoding", column(features))
    both = prepare(from_arrow(nodes, graph.edges, "toy"), tmp_path / "both", encoder=encoder_folder, max_tokens=24)
    texts = prepare(from_arrow(graph.nodes, graph.edges, "toy"), tmp_path / "t", encoder=encoder_folder, max_tokens=24)
    assert both.meta["hash"] == texts.meta["hash"]
    assert "encodings" not in both.meta
    assert both.partition(0).encodings is None


def test_changed_encodings_are_refused_and_others_read(tmp_path, graph, features):
    tag = prepare(from_arrow(*with_encodings(graph, features)), tmp_path / "tag")
    file = tmp_path / "tag" / "part-00000" / "encodings.npy"
    content = file.read_bytes()
    assert np.array_equal(load_encodings(content), tag.partition(0).encodings)  # as from a store without maps
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"encodings\.npy changed.*prepare the graph again"):
        tag.partition(0)
    file.unlink()
    with pytest.raises(DataError, match=r"encodings\.npy: no such file"):
        tag.partition(0)


def broken(change):
    """Six encodings as lists, of which ``change`` makes something else."""
    rows = vectors(6, 3).tolist()
    change(rows)
    return pa.array(rows, pa.list_(pa.float64()))


def test_a_good_column_is_good(tmp_path):
    graph = validate(small(broken(lambda rows: None)))
    assert (graph.width, graph.text_bytes) == (3, 36)


def small(encoding):
    table = {"node_id": [10, 11, 12, 13, 14, 15], "label": [0, 1, 0, 1, 0, 1], "encoding": encoding}
    return from_arrow(pa.table(table), pa.table({"src": [10], "dst": [11]}))


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        (broken(lambda r: r.__setitem__(2, None)), ["1 encodings are null (node_id 12)", "drop the node"]),
        (broken(lambda r: [r[1].append(0.5), r[4].pop()]), ["2 encodings are not 3 wide", "11, 14", "same width"]),
        (broken(lambda r: r[3].__setitem__(0, float("nan"))), ["1 encodings have values", "NaN", "13", "replace"]),
        (broken(lambda r: r[3].__setitem__(1, float("-inf"))), ["1 encodings have", "infinite", "13", "replace"]),
        (broken(lambda r: r[5].__setitem__(1, None)), ["1 encodings have values that are null", "15"]),
        (broken(lambda r: r[0].__setitem__(1, -65505.0)), ["1 encodings", "beyond ±65504", "10", "scale"]),
        (pa.array([[1, 2]] * 6), ["is list<", "int64", "make it lists of floats"]),
        (pa.array(["[1.0]"] * 6), ["is string", "make it lists of floats", "CSV has no lists"]),
        (pa.array([[]] * 6, pa.list_(pa.float32())), ["without any number"]),
    ],
)
def test_bad_encodings_are_told(encoding, says):
    with pytest.raises(DataError) as caught:
        validate(small(encoding))
    for part in ("nodes table, column encoding", *says):
        assert part in str(caught.value)
    assert "problems" not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once_with_the_first_rows():
    x = vectors(40, 2)
    x[3:20, 0], x[30, 1] = np.inf, 1e6
    label = np.arange(40) % 2
    nodes = pa.table({"node_id": np.arange(40), "label": label, "encoding": column(x, pa.list_(pa.float64()))})
    with pytest.raises(DataError) as caught:
        validate(from_arrow(nodes, pa.table({"src": [0], "dst": [77]})))
    for part in ("17 encodings have", "node_id 3, 4, 5, 6, 7, …", "1 encodings have", "node_id 30", "no node has (77)"):
        assert part in str(caught.value)


def test_csv_and_tables_without_either_are_refused(tmp_path):
    pacsv.write_csv(pa.table({"node_id": [1, 2], "label": [0, 1], "encoding": ["[1]", "[2]"]}), tmp_path / "n.csv")
    with pytest.raises(DataError, match=r"n\.csv, column encoding: is string.*CSV has no lists"):
        validate(open_tables(tmp_path / "n.csv", None))
    pq.write_table(pa.table({"node_id": [1, 2], "label": [0, 1]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"missing column text.*node_id, text \(or encoding, in Parquet\), label are"):
        validate(open_tables(tmp_path / "n.parquet", None))


def test_the_encoder_of_prepare_must_fit(tmp_path, graph, features):
    source = from_arrow(*with_encodings(graph, features))
    assert (
        prepare(source, tmp_path / "a", encoder="given:8").meta["hash"] == prepare(source, tmp_path / "b").meta["hash"]
    )
    with pytest.raises(ConfigError, match=r"'given:9'.*encodings 8 wide.*leave encoder out, or set given:8"):
        prepare(source, tmp_path / "c", encoder="given:9")
    with pytest.raises(ConfigError, match=r"'given:8' reads no texts"):
        prepare(from_arrow(graph.nodes, graph.edges), tmp_path / "c", encoder="given:8", max_tokens=1)
    with pytest.raises(ConfigError, match=r"'given:x'.*such as given:128"):
        prepare(from_arrow(graph.nodes, graph.edges), tmp_path / "c", encoder="given:x")
    assert not (tmp_path / "c").exists()


# -- the encoder ------------------------------------------------------------------------------------------


@pytest.fixture
def encoder():
    return GivenEncoder(EncoderConfig(name="given:8", device="cpu"))


def test_injection_is_autograd_and_residual_its_definition(encoder):
    x, d_hs, target = torch.randn(5, 1, WIDTH), torch.randn(5, WIDTH, dtype=torch.float64), torch.randn(5, WIDTH)
    leaf = x.clone().requires_grad_()
    (truth,) = torch.autograd.grad((leaf[:, 0].double() * d_hs).sum(), leaf)
    assert torch.equal(encoder.inject(x, d_hs), truth)
    distance, gradient = encoder.residual(x, target)
    loss = (leaf[:, 0] - target).pow(2).sum(1)
    assert torch.equal(distance, loss.detach())
    assert torch.equal(gradient, torch.autograd.grad(loss.sum(), leaf)[0])
    assert torch.equal(encoder.encode_embeds(x), x[:, 0])


def test_fit_is_fit_encodings(encoder):
    x, y = torch.randn(6, 1, WIDTH), torch.eye(3).repeat(2, 1)
    first, second = (Student(StudentConfig(hidden=4), WIDTH, 3, seed=1) for _ in range(2))
    assert encoder.fit(first, x, y, InnerConfig(passes=9), seed=2) == fit_encodings(
        second, x[:, 0], y, InnerConfig(passes=9), seed=2
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_the_encoder_cannot_is_refused(encoder):
    assert isinstance(load_encoder(encoder.config), GivenEncoder)
    assert encoder.tokenizer.fingerprint == "given:8"
    assert encoder.fingerprint != GivenEncoder(EncoderConfig(name="given:9")).fingerprint
    for x in (torch.zeros(2, 2, WIDTH), torch.zeros(2, 1, WIDTH + 1)):
        with pytest.raises(ConfigError, match=r"--synthetic\.tokens 1"):
            encoder.encode_embeds(x)
    with pytest.raises(ConfigError, match="no weights to adapt"):
        GivenEncoder(EncoderConfig(name="given:8", adapters=True))
    with pytest.raises(ConfigError, match="is a language model"):
        GivenEncoder(EncoderConfig(name="minilm"))
    with pytest.raises(ConfigError, match="adapters of another encoder"):
        encoder.load_adapters({"lora": np.zeros(1)})
    with pytest.raises(ConfigError, match="no tokens"):
        encoder.tokenizer.decode([1])


def test_graph_and_encoder_must_belong_together(given_tags, tags, encoder, make_encoder):
    with pytest.raises(DataError, match=r"encodings 8 wide.*set --encoder\.name given:8 --synthetic\.tokens 1"):
        LocalPool(given_tags[1], make_encoder(), KernelConfig(), RuntimeConfig())
    with pytest.raises(DataError, match=r"has texts, no encodings as encoder 'given:8'.*set --encoder\.name /"):
        LocalPool(tags[1], encoder, KernelConfig(), RuntimeConfig())


# -- distillation -----------------------------------------------------------------------------------------


def settings(init="two-stage", **synthetic):
    values = {
        "encoder": {"name": "given:8", "device": "cpu"},
        "kernel": {"precision": "float64"},
        "synthetic": {"size": 6, "tokens": 1, "init": init, "storage": "float32", **synthetic},
        "two_stage": {"feature_steps": 10, "student_steps": 2, "student_passes": 10},
        "student": {"hidden": 16, "dropout": 0.0},
        "inner": {"passes": 20, "gnn_lr": 0.02},
        "outer": {"epochs": 2, "steps": 3, "lr": 2e-2},
    }
    return DistillConfig.from_dict(values)


def pool_of(tag, encoder, kernel):
    pool = LocalPool(tag, encoder, kernel, RuntimeConfig(cache=True))
    pool.encode({})
    return pool


@pytest.mark.parametrize("init", ["random", "medoid", "two-stage"])
def test_any_number_of_parts_distils_the_same(given_tags, encoder, init):
    config = settings(init)
    results = [distill(pool_of(tag, encoder, config.kernel), encoder, config) for tag in given_tags.values()]
    assert results[0].token_embeds.shape == (6, 1, WIDTH)
    assert results[0].metrics["val_accuracy"] > 0.5
    for other in results[1:]:
        assert torch.allclose(other.token_embeds, results[0].token_embeds, atol=1e-5)
        assert other.metrics["val_accuracy"] == results[0].metrics["val_accuracy"]


def test_nothing_is_cached(given_tags, encoder):
    pool_of(given_tags[1], encoder, KernelConfig())
    assert not (Path(given_tags[1].path) / "encodings").exists()


def test_the_encodings_of_a_language_model_distil_as_its_texts_do(tmp_path, graph, tags, make_encoder, make_pool):
    """Stage one sees encodings alone: rounded to float16 on both sides, texts and encodings give the same bits."""
    model = make_encoder()
    exact = model.encode_tokens
    model.encode_tokens = lambda *a: exact(*a).astype(np.float16).astype(np.float32)
    texts = make_pool(model, 1, architecture="sgc")
    x = texts.gather()
    config = settings()
    config = dataclasses.replace(config, encoder=EncoderConfig(name=f"given:{x.shape[1]}", device="cpu"))
    config = dataclasses.replace(config, outer=dataclasses.replace(config.outer, targets="labels"))
    counts, nothing = class_counts(texts.tag, config), lambda *_: None
    centres = torch.from_numpy(class_centres(sample_for(texts, counts, 0), counts, 0))
    truth = optimise_encodings(texts, centres, one_hot_labels(counts), config, nothing).h_s
    nodes, edges = with_encodings(graph, x)
    tag = prepare(from_arrow(nodes, edges), tmp_path / "tag", halo_hops=2, method="hash")
    given = GivenEncoder(config.encoder)
    found = initialise(RealSide(pool_of(tag, given, config.kernel), config), given, config, nothing)
    assert torch.equal(found.x_s, truth[:, None])


def test_starts_and_coresets_are_propagated_encodings(given_tags, encoder):
    config = settings("medoid")
    pool = pool_of(given_tags[3], encoder, config.kernel)
    rows = {tuple(row) for row in pool.sample(99, 0).features.tolist()}
    start = initialise(RealSide(pool, config), encoder, config, lambda *_: None)
    coreset, size = coreset_tag(pool, encoder, class_counts(pool.tag, config), "herding", DistillConfig())
    assert size == 6 * 2 * WIDTH
    for x in (start.x_s, coreset.token_embeds):
        assert x.shape == (6, 1, WIDTH)
        assert {tuple(row) for row in x[:, 0].tolist()} <= rows


# -- the command line -------------------------------------------------------------------------------------


def test_from_tables_to_a_table_on_the_command_line(told, tmp_path, graph, features):
    for name, table in zip(("nodes", "edges"), with_encodings(graph, features), strict=True):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    data, run = tmp_path / "prepared", tmp_path / "run"
    out, _ = told(
        "prepare", "--nodes", tmp_path / "nodes.parquet", "--edges", tmp_path / "edges.parquet", "--out", data
    )
    assert "8 wide, float16" in out
    options = ["--encoder.name", "given:8", "--synthetic.tokens", "1", "--synthetic.size", "6"]
    out, _ = told("estimate", data, *options)
    assert "encodings" in out
    options += ["--evaluation.seeds", "1", "--evaluation.recipe.passes", "20"]
    out, _ = told("distill", "--data", data, "--out", run, *options, "--evaluate", "true")
    assert "% of the training encodings" in out
    card = (run / "synthetic" / "README.md").read_text()
    assert "learned encodings" in card
    assert "Nearest-token" not in card
    out, _ = told("inspect", run, "--data", data)
    assert "6 nodes of one encoding (8 wide)" in out
    assert "nearest" not in out
    told("export", run, "--encodings", "true", "--out", tmp_path / "s.pt")
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    assert torch.equal(saved["x"], saved["token_embeds"][:, 0])
    _, err = told("export", run, "--format", "text", code=2)
    assert "has no texts" in err
    out, _ = told("evaluate", run, "--data", data, "--seeds", "1", "--against", "[random]", "--recipe.passes", "9")
    assert "| random | 6 | 96 |" in out


def test_the_plan_counts_what_a_shard_of_encodings_holds(given_tags, encoder):
    config = settings()
    pool = pool_of(given_tags[3], encoder, config.kernel)
    plan = planned(given_tags[3], config, None)
    for shard, counted in zip(pool.shards, plan.shards, strict=True):
        part = shard.part
        assert part.encodings is not None
        assert counted["encodings"] == part.encodings.nbytes
        assert counted["H"] == 4 * len(part.degree) * WIDTH
        assert np.shares_memory(shard._propagation.indices, part.indices)
    assert plan.flop["encode"] == plan.model - 4 * WIDTH == plan.token_table == 0


def test_all_settings_that_cannot_be_are_told_at_once(told, given_tags, tmp_path):
    options = ["--encoder.adapters", "true", "--synthetic.storage", "int4", "--synthetic.discrete", "true"]
    words = ["--data", given_tags[1].path, "--out", tmp_path / "run", "--outer.epochs", "0", *options]
    _, err = told("distill", *words, code=2)
    remedy = "--encoder.name given:8 --encoder.adapters false --synthetic.tokens 1 --synthetic.discrete false"
    assert f"set {remedy} --synthetic.storage int8" in err
    assert "brings encodings 8 wide" in err
    _, err = told("estimate", given_tags[1].path, code=2)
    assert "set --encoder.name given:8 --synthetic.tokens 1" in err


def test_prepared_graphs_of_before_are_read(tmp_path, graph, prepare_graph, make_encoder, make_pool):
    """int64 columns, as they were written once, give the same."""
    tag, encoder = prepare_graph(graph, parts=2), make_encoder()
    now = make_pool(encoder, tag).sample(9, 0).features
    for index, record in enumerate(tag.meta["parts"]):
        file = Path(tag.path) / f"part-{index:05d}" / "graph.safetensors"
        arrays = load_file(file)
        assert arrays["indices"].dtype == np.int32
        save_file(arrays | {"indices": arrays["indices"].astype(np.int64)}, file)
        record["files"][file.name]["sha256"] = storage.file_hash(file)
    tag.meta["hash"] = content_hash(tag.meta)
    (Path(tag.path) / "META.json").write_bytes(storage.to_json(tag.meta))
    assert np.array_equal(make_pool(encoder, PreparedTag(tag.path)).sample(9, 0).features, now)
