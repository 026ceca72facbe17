"""PyG data and OGB folders, good and bad; labels and ids of every kind."""

from __future__ import annotations

import gzip
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_bad_tables import GOOD_NODES, csv, message_of, parquet
from torch_geometric.data import Data

from talk_dist.data.prepare import prepare
from talk_dist.data.pyg import from_pyg
from talk_dist.data.tables import from_arrow, from_ogb
from talk_dist.data.validate import validate
from talk_dist.errors import DataError


def pyg(**changed: Any) -> Data:
    mask = torch.tensor([True, True, True, False, False, False])
    good = {
        "text": list(GOOD_NODES["text"]),
        "y": torch.tensor([0, 1, 2, 0, 1, 2]),
        "edge_index": torch.tensor([[0, 1], [2, 3]]),
        "train_mask": mask,
        "val_mask": ~mask,
    }
    return Data(**{key: value for key, value in (good | changed).items() if value is not None})


@pytest.mark.parametrize(
    ("changed", "contains"),
    [
        ({"text": None}, ["attribute text: missing", "list of strings"]),
        ({"y": None}, ["attribute y: missing", "set data.y"]),
        ({"edge_index": None, "adj_t": "sparse"}, ["attribute edge_index", "only adj_t", "set data.edge_index"]),
        ({"y": torch.zeros(6, 3)}, ["attribute y", "(6, 3)", "choose one column"]),
        ({"train_mask": torch.ones(6, 10, dtype=torch.bool)}, ["attribute train_mask", "(6, 10)", "choose one"]),
        ({"text": ["a", "b"]}, ["attribute y", "6 rows for 2 texts"]),
        ({"text": [1] * 6}, ["attribute text: has int", "make it strings"]),
        ({"y": [0, 1, 2, 0, 1, 2]}, ["attribute y: is list", "make it a tensor"]),
        (
            {"edge_index": torch.tensor([[0, 2], [1, 3], [2, 4]])},
            ["edge_index: has shape (3, 2)", "(2, number of edges)"],
        ),
        ({"edge_index": torch.tensor([0, 2])}, ["edge_index: has shape (2,)", "make it (2, number of edges)"]),
        ({"val_mask": torch.ones(6, dtype=torch.bool)}, ["masks", "3 nodes", "train and val", "0, 1, 2", "one split"]),
    ],
)
def test_bad_pyg_data(changed: dict[str, Any], contains: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        validate(from_pyg(pyg(**changed), name="toy"))
    for part in ["toy", *contains]:
        assert part in str(caught.value)


def test_masks_that_overlap_do_not_matter_when_they_are_not_used() -> None:
    source = from_pyg(pyg(val_mask=torch.ones(6, dtype=torch.bool)))
    assert validate(source, use_split_column=False).split is None


def test_bad_ogb_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        from_ogb(tmp_path / "ogbn_arxiv")
    assert len(caught.value.problems) == 7
    for name in ("edge.csv.gz", "node-label.csv.gz", "valid.csv.gz", "nodeidx2paperid.csv.gz", "titleabs.tsv.gz"):
        assert name in str(caught.value)
    root = write_ogb(tmp_path / "ogbn_arxiv", splits={"train": [0, 1, 2], "valid": [2, 3], "test": [4]})
    message = message_of(from_ogb(root))
    assert re.search(r"split/time/\*\.csv\.gz: 1 nodes are in both train and val \(2\)", message), message
    write_ogb(root, splits={"train": [0, 1, 2], "valid": [3], "test": [4, 77]})
    with pytest.raises(DataError, match="rows up to 77, beyond the 6 nodes"):
        from_ogb(root)
    write_ogb(root, papers=[100, 101, 102, 103, 104, 999])
    assert re.search(r"column text: 1 texts are empty or null \(node_id 5\)", message_of(from_ogb(root)))


def write_ogb(root: Path, splits: dict[str, list[int]] | None = None, papers: list[int] | None = None) -> Path:
    """ogbn-arxiv in small, with the tar header and the repeats that its texts have."""
    papers = papers or [100, 101, 102, 103, 104, 105]
    files = {
        "raw/edge.csv.gz": "0,2\n1,3\n",
        "raw/node-label.csv.gz": "0\n1\n2\n0\n1\nnan\n",
        "mapping/nodeidx2paperid.csv.gz": "node idx,paper id\n" + "".join(f"{i},{p}\n" for i, p in enumerate(papers)),
        "titleabs.tsv.gz": 'titleabs.tsv\x00\x00000644\x00ustar\x00105\tLast\tcomes "first\n7\tUnknown\tpaper\n'
        + "".join(f"{100 + i}\tTitle {i}\tAbstract {i}\n" for i in range(5))
        + "100\tTitle again\tAbstract again\n\x00\x00\x00\x00\n",
    }
    for name, rows in (splits or {"train": [0, 1, 2], "valid": [3], "test": [4]}).items():
        files[f"split/time/{name}.csv.gz"] = "".join(f"{row}\n" for row in rows)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(content.encode()))
    return root


def test_good_ogb_folder(tmp_path: Path) -> None:
    source = from_ogb(write_ogb(tmp_path / "ogbn_arxiv"))
    rows = [row for batch in source.node_batches() for row in batch.to_pylist()]
    assert rows[0] == {"node_id": 5, "text": 'Last. comes "first', "label": -1, "split": ""}
    assert [row["text"] for row in rows[1:]] == [f"Title {i}. Abstract {i}" for i in range(5)]
    graph = validate(source)
    assert graph.label.tolist() == [-1, 0, 1, 2, 0, 1]
    assert graph.split is not None
    assert graph.split.tolist() == [-1, 0, 0, 0, 1, 2]
    assert graph.node_id.take(pa.array(graph.src)).to_pylist() == [0, 1]
    assert graph.node_id.take(pa.array(graph.dst)).to_pylist() == [2, 3]


def test_good_pyg_data() -> None:
    assert len(validate(from_pyg(pyg(text=np.array(list("abcdef"))))).node_id) == 6
    labels = torch.tensor([[0], [1], [2], [0], [-1], [2]])
    for kind in (torch.int64, torch.float16, torch.bfloat16):
        graph = validate(from_pyg(pyg(y=labels.to(kind))))
        assert graph.label.tolist() == [0, 1, 2, 0, -1, 2]
    assert graph.split is not None
    assert graph.split.tolist() == [0, 0, 0, 1, 1, 1]
    assert (graph.src.tolist(), graph.dst.tolist()) == ([0, 1], [2, 3])
    assert graph.text_bytes == sum(len(text) for text in GOOD_NODES["text"])


def test_labels_of_every_kind_mean_the_same(tmp_path: Path) -> None:
    kinds: dict[str, tuple[Any, list[str]]] = {
        "integers": ([5, -1, 30, 5, -1, 30], ["5", "30"]),  # numeric order, gaps closed
        "floats with holes": ([5.0, None, 30.0, 5.0, float("nan"), 30.0], ["5", "30"]),
        "strings": (["ant", "", "bee", "ant", None, "bee"], ["ant", "bee"]),
        "categories": (pa.array(["ant", "", "bee", "ant", None, "bee"]).dictionary_encode(), ["ant", "bee"]),
    }
    for label, classes in kinds.values():
        graph = validate(from_arrow(pa.table(GOOD_NODES | {"label": label, "split": [""] * 6}), None))
        assert graph.classes == classes
        assert graph.label.tolist() == [0, -1, 1, 0, -1, 1]
        assert graph.label.dtype == np.int32
    named = GOOD_NODES | {"label": [5, -1, 30, 5, -1, 30], "label_name": ["ant", "x", "bee", "", "y", "bee"]}
    for make in (parquet, csv):
        assert validate(make(tmp_path, named), use_split_column=False).classes == ["ant", "bee"]


def test_csv_ids_are_integers_only_if_all_of_them_are(tmp_path: Path) -> None:
    graph = validate(csv(tmp_path, GOOD_NODES))
    assert graph.node_id.type == pa.int64()
    ids = ["007", "7", "a", "b", "c", "d"]  # 007 is not 7
    graph = validate(csv(tmp_path, GOOD_NODES | {"node_id": ids}, {"src": ["007"], "dst": ["7"]}))
    assert graph.node_id.to_pylist() == ids
    assert (graph.src.tolist(), graph.dst.tolist()) == ([0], [1])


def test_table_that_changes_between_its_two_readings(tmp_path: Path) -> None:
    source = from_arrow(pa.table(GOOD_NODES), None)
    readings = iter([pa.table(GOOD_NODES), pa.table(GOOD_NODES).slice(0, 4)])
    nodes = replace(source.nodes, batches=lambda wanted: iter(next(readings).select(list(wanted)).to_batches()))
    with pytest.raises(DataError, match=r"nodes table.*changed while it was being prepared"):
        prepare(replace(source, nodes=nodes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
