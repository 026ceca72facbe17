"""Every bad input is one DataError that names file, column, offending values and the remedy."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from talk_dist.data.prepare import prepare
from talk_dist.data.tables import Source, from_arrow, open_tables
from talk_dist.data.validate import validate
from talk_dist.errors import DataError

GOOD_NODES: dict[str, list[Any]] = {
    "node_id": [10, 11, 12, 13, 14, 15],
    "text": ["red", "green", "blue", "red red", "green green", "blue blue"],
    "label": [0, 1, 2, 0, 1, 2],
    "split": ["train", "train", "train", "val", "test", ""],
}
GOOD_EDGES: dict[str, list[Any]] = {"src": [10, 11], "dst": [12, 13]}


def message_of(source: Source, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        validate(source, **settings)
    return str(caught.value)


def parquet(folder: Path, nodes: dict[str, Any] | pa.Table, edges: dict[str, Any] | pa.Table = GOOD_EDGES) -> Source:
    for name, columns in (("nodes", nodes), ("edges", edges)):
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), folder / f"{name}.parquet")
    return open_tables(folder / "nodes.parquet", folder / "edges.parquet")


def csv(folder: Path, nodes: dict[str, Any], edges: dict[str, Any] = GOOD_EDGES) -> Source:
    for name, columns in (("nodes", nodes), ("edges", edges)):
        pacsv.write_csv(pa.table(columns), folder / f"{name}.csv")
    return open_tables(folder / "nodes.csv", folder / "edges.csv")


def test_the_good_tables_are_good(tmp_path: Path) -> None:
    for make in (parquet, csv):
        graph = validate(make(tmp_path, GOOD_NODES))
        assert graph.classes == ["0", "1", "2"]
        assert graph.src.tolist() == [0, 1]
        assert graph.dst.tolist() == [2, 3]
        assert graph.split is not None
        assert graph.split.tolist() == [0, 0, 0, 1, 2, -1]


def without(column: str) -> dict[str, list[Any]]:
    return {name: values for name, values in GOOD_NODES.items() if name != column}


# what is changed in the good tables → what the message must contain, beside the file
BAD_NODES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no text column": (without("text"), ["missing column text", "'node_id'", "add or rename"]),
    "no id column": (without("node_id"), ["missing column node_id", "add or rename"]),
    "no label column": (without("label"), ["missing column label", "add or rename"]),
    "duplicate ids": ({"node_id": [10, 11, 12, 13, 10, 11]}, ["column node_id", "2 ids", "10, 11", "drop the dup"]),
    "empty texts": ({"text": ["a", "", " \t\n", None, "b", "c"]}, ["column text", "3 texts", "11, 12, 13", "drop the"]),
    "unknown splits": (
        {"split": ["train", "train", "train", "dev", "dev", "holdout"]},
        ["column split", "3 unknown", "'dev', 'holdout'", "use train, val, test"],
    ),
    "class absent from training": (
        {"split": ["train", "val", "train", "val", "test", ""]},
        ["column split", "1 of 3 classes", "'1'", "unlabel or merge"],
    ),
    "nobody trains": ({"split": ["val"] * 6}, ["column split", "3 of 3 classes", "'0', '1', '2'", "use_split_column"]),
    "no labels": ({"label": [-1] * 6}, ["column label", "none of 6", "label some"]),
    "labels below -1": ({"label": [0, 1, 2, -7, -100, 2]}, ["column label", "2 nodes", "-100, -7", "-1 is unlabelled"]),
    "two names of a label": (
        {"label_name": ["a", "b", "c", "z", "b", "c"]},
        ["column label_name", "'0: a, z'", "one name"],
    ),
    "one name of two labels": ({"label_name": ["a", "a", "c", "a", "a", "c"]}, ["column label_name", "'a'", "rename"]),
}
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 6, pa.array([b"a", b"\xff\xfe", b"c", b"d", b"e", b"f"]).buffers())
BAD_TYPES: dict[str, tuple[dict[str, Any], list[str]]] = {  # CSV has no types to be wrong
    "float ids": ({"node_id": [0.5, 1, 2, 3, 4, 5]}, ["column node_id", "double", "integers or strings"]),
    "huge ids": ({"node_id": pa.array([2**63, *range(5)], pa.uint64())}, ["column node_id", "too large", "64-bit"]),
    "an endless label": (
        {"label": [float("inf"), 1.0, 2.0, 0.0, 1.0, 2.0]},
        ["column label", "inf", "integers or str"],
    ),
    "null ids": ({"node_id": [10, None, 12, 13, 14, 15]}, ["column node_id", "row 1", "give every node an id"]),
    "texts are numbers": ({"text": [1, 2, 3, 4, 5, 6]}, ["column text", "int64", "make it strings"]),
    "fractional labels": ({"label": [0.5, 1.0, 2.0, 0.0, 1.0, 2.5]}, ["column label", "0.5, 2.5", "integers or str"]),
    "labels are lists": ({"label": [[0]] * 6}, ["column label", "list", "integers"]),
    "splits are numbers": ({"split": [0, 0, 0, 1, 2, 0]}, ["column split", "int64", "train, val, test"]),
    "names are lists": ({"label_name": [["a"]] * 6}, ["column label_name", "list", "make it strings"]),
    **{
        f"{name} is not UTF-8": ({name: NOT_UTF8}, [f"column {name}", "not valid UTF-8", "write it again"])
        for name in ("node_id", "text", "label", "label_name", "split")
    },
}


def check_nodes(make: Callable[..., Source], folder: Path, changed: dict[str, Any], contains: list[str]) -> None:
    nodes = changed if len(changed) > 2 else GOOD_NODES | changed
    message = message_of(make(folder, nodes))
    for part in [str(folder / "nodes."), *contains]:
        assert part in message, message
    assert "problems" not in message, message  # this one and no other


@pytest.mark.parametrize("make", [parquet, csv])
@pytest.mark.parametrize("case", BAD_NODES)
def test_bad_node_table(tmp_path: Path, make: Callable[..., Source], case: str) -> None:
    check_nodes(make, tmp_path, *BAD_NODES[case])


@pytest.mark.parametrize("case", BAD_TYPES)
def test_bad_type_in_the_node_table(tmp_path: Path, case: str) -> None:
    check_nodes(parquet, tmp_path, *BAD_TYPES[case])


@pytest.mark.parametrize("make", [parquet, csv])
@pytest.mark.parametrize(
    ("edges", "contains"),
    [
        (
            {"src": [10, 99, 98, 99], "dst": [11, 12, 13, 14]},
            ["column src", "3 edges", "2 ids", "99, 98", "drop the edges"],
        ),
        ({"source": [10], "target": [11]}, ["missing columns src, dst", "'source', 'target'", "add or rename"]),
    ],
)
def test_bad_edge_table(
    tmp_path: Path, make: Callable[..., Source], edges: dict[str, list[int]], contains: list[str]
) -> None:
    message = message_of(make(tmp_path, GOOD_NODES, edges))
    for part in [str(tmp_path / "edges."), *contains]:
        assert part.replace("99, 98", "'99', '98'" if make is csv else "99, 98") in message, message
    assert "problems" not in message


@pytest.mark.parametrize(
    ("edges", "contains"),
    [
        ({"src": ["10"], "dst": ["11"]}, ["column src", "is string", "node_id is int64", "both integers or both"]),
        ({"src": [10.0], "dst": [11.0]}, ["column src", "is double", "both integers or both"]),
        ({"src": [10, None], "dst": [11, 12]}, ["column src", "1 edges", "null", "drop the edges"]),
        ({"src": pa.array([2**64 - 1], pa.uint64()), "dst": [11]}, ["column src", "signed 64-bit"]),
        ({"src": [10] * 6, "dst": NOT_UTF8}, ["column dst", "not valid UTF-8", "write it again"]),
    ],
)
def test_edges_of_another_type_than_the_ids(tmp_path: Path, edges: dict[str, Any], contains: list[str]) -> None:
    message = message_of(parquet(tmp_path, GOOD_NODES, edges))
    for part in [str(tmp_path / "edges.parquet"), *contains]:
        assert part in message, message


def test_only_the_first_five_values_are_listed(tmp_path: Path) -> None:
    message = message_of(parquet(tmp_path, GOOD_NODES, {"src": range(100, 120), "dst": [10] * 20}))
    assert "20 edges end at 20 ids that no node has (100, 101, 102, 103, 104, …)" in message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    nodes = GOOD_NODES | {
        "node_id": [10, 10, 12, 13, 14, 15],
        "text": ["", "b", "c", "d", "e", None],
        "split": ["train", "train", "train", "dev", "", ""],
        "label": [0, 1, 2, -5, 1, 2],
    }
    source = parquet(tmp_path, nodes, {"src": [10, 7], "dst": [8, 12]})
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out")
    problems = caught.value.problems
    for part in ("column node_id", "column text", "column split", "column label:", "column src", "column dst"):
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == 6
    assert "6 problems" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_both_tables_missing_are_two_problems_of_one_error(tmp_path: Path) -> None:
    message = message_of(open_tables(tmp_path / "nodes.parquet", tmp_path / "edges.parquet"))
    for name in ("nodes.parquet", "edges.parquet"):
        assert f"{tmp_path / name}: no such file or folder; check the path" in message


@pytest.mark.parametrize("size", [0, 0.5, 0.99])
def test_parquet_that_was_cut_short(tmp_path: Path, size: float) -> None:
    source = parquet(tmp_path, GOOD_NODES)
    data = (tmp_path / "nodes.parquet").read_bytes()
    (tmp_path / "nodes.parquet").write_bytes(data[: int(len(data) * size)])
    message = message_of(source)
    assert re.search(r"nodes\.parquet: cannot be read \(.+\); it is cut short or damaged: copy", message), message


def test_parquet_with_damage_in_the_middle(tmp_path: Path) -> None:
    texts = [f"text {i} {'x' * 200}" for i in range(5000)]
    nodes = pa.table({"node_id": range(5000), "text": texts, "label": [0] * 5000})
    pq.write_table(nodes, tmp_path / "nodes.parquet", compression="gzip", use_dictionary=False)
    data = bytearray((tmp_path / "nodes.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    (tmp_path / "nodes.parquet").write_bytes(bytes(data))
    assert "cut short or damaged" in message_of(open_tables(tmp_path / "nodes.parquet", None))


def test_csv_that_is_no_csv(tmp_path: Path) -> None:
    (tmp_path / "nodes.csv").write_text("node_id,text,label\n1,a,0\n2,b\n")
    assert re.search(
        r"nodes\.csv: cannot be read .*Expected 3 columns", message_of(open_tables(tmp_path / "nodes.csv", None))
    )
    (tmp_path / "empty.csv").write_text("")
    assert "cut short" in message_of(open_tables(tmp_path / "empty.csv", None))
    (tmp_path / "latin.csv").write_bytes("node_id,text,label\n1,caf\xe9,0\n".encode("latin-1"))
    assert re.search("cannot be read .*; save it in UTF-8", message_of(open_tables(tmp_path / "latin.csv", None)))
    whole = gzip.compress(b"node_id,text,label\n" + b"".join(b"%d,text %d,0\n" % (i, i * i) for i in range(9999)))
    (tmp_path / "half.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut short" in message_of(open_tables(tmp_path / "half.csv.gz", None))


def test_a_header_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("node_id,text,label,cat\xe9\n1,a,0,b\n".encode("latin-1"))
    assert re.search("cannot be read .*; save it in UTF-8", message_of(open_tables(tmp_path / "latin.csv", None)))


@pytest.mark.parametrize("name", ["text", "split", "src"])
def test_a_column_that_is_there_twice(tmp_path: Path, name: str) -> None:
    tables = [GOOD_NODES, GOOD_EDGES]
    nodes, edges = (
        pa.table([*table.values(), *([table[name]] if name in table else [])], [*table, *([name] * (name in table))])
        for table in tables
    )
    message = message_of(parquet(tmp_path, nodes, edges))
    assert f"column {name}: is there more than once; drop or rename all but one" in message
    assert "problems" not in message


def test_folder_without_tables_and_unknown_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    assert "found nothing" in message_of(open_tables(tmp_path / "nodes", None))
    (tmp_path / "nodes" / "a.parquet").write_text("")
    (tmp_path / "nodes" / "b.csv").write_text("")
    assert re.search(r"found a\.parquet, b\.csv.*unmixed", message_of(open_tables(tmp_path / "nodes", None)))
    (tmp_path / "nodes.xlsx").write_text("")
    assert re.search(r"nodes\.xlsx.*give \.parquet, \.csv", message_of(open_tables(tmp_path / "nodes.xlsx", None)))


def test_folder_whose_files_disagree(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    pq.write_table(pa.table(GOOD_NODES), tmp_path / "nodes" / "a.parquet")
    pq.write_table(pa.table(GOOD_NODES | {"node_id": list("abcdef")}), tmp_path / "nodes" / "b.parquet")
    message = message_of(open_tables(tmp_path / "nodes", None))
    assert "column node_id: is integers in one file and strings in another" in message
    pq.write_table(pa.table(without("text")), tmp_path / "nodes" / "b.parquet")
    assert "b.parquet: lacks the column text of other files there" in message_of(open_tables(tmp_path / "nodes", None))
    for name in ("a", "b"):
        columns = GOOD_NODES if name == "a" else without("split")
        pq.write_table(pa.table(columns), tmp_path / "nodes" / f"{name}.parquet")
    assert "b.parquet: lacks the column split of other files there" in message_of(open_tables(tmp_path / "nodes", None))


def test_table_without_rows(tmp_path: Path) -> None:
    empty = pa.table(
        {"node_id": pa.array([], pa.int64()), "text": pa.array([], pa.string()), "label": pa.array([], pa.int32())}
    )
    assert "nodes.parquet: has no rows" in message_of(parquet(tmp_path, empty))


def test_random_split_that_leaves_a_class_out_of_training(tmp_path: Path) -> None:
    nodes = {"node_id": range(40), "text": ["t"] * 40, "label": ["common"] * 39 + ["rare"]}
    source = from_arrow(pa.table(nodes), None)
    messages = []
    for seed in range(8):
        try:
            prepare(source, tmp_path / str(seed), split_seed=seed)
        except DataError as error:
            messages.append(str(error))
            assert not (tmp_path / str(seed)).exists()
    assert 0 < len(messages) < 8  # of a probability of 0.4 each
    assert re.search(r"nodes table, column label: 1 of 2 classes .*'rare'.*try another split_seed", messages[0])
