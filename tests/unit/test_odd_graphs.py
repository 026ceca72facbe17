"""Graphs that are unusual and must work: no edges, loops, repeats, directed input, a giant hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_prepare import parts_of

from talk_dist.data.prepare import prepare
from talk_dist.data.tables import Source, from_arrow

Tables = tuple[pa.Table, pa.Table]


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
