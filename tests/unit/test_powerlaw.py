"""benchmarks/powerlaw.py makes the graph that it says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import powerlaw
from powerlaw import PowerLaw, write

GRAPH = PowerLaw(nodes=20_003, edges=200_000, classes=7, width=6, seed=5, homophily=0.55)


@pytest.fixture(scope="module")
def tables():
    """label (N,), src and dst (E,)."""
    nodes, edges = (pa.Table.from_batches(list(b)) for b in (GRAPH.node_batches(), GRAPH.edge_batches()))
    assert nodes.schema.field("encoding").type == pa.list_(pa.float16(), 6)
    assert np.array_equal(nodes["node_id"].to_numpy(), np.arange(GRAPH.nodes))
    return nodes["label"].to_numpy(), edges["src"].to_numpy(), edges["dst"].to_numpy()


def test_a_seed_fixes_the_bytes_and_another_one_changes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(powerlaw, "NODES_AT_ONCE", 300)
    monkeypatch.setattr(powerlaw, "EDGES_AT_ONCE", 700)
    for name, seed in (("a", 1), ("again", 1), ("other", 2)):
        write(PowerLaw(nodes=1000, edges=3000, width=4, seed=seed), tmp_path / name)
    for table in ("nodes.parquet", "edges.parquet"):
        a, again, other = ((tmp_path / name / table).read_bytes() for name in ("a", "again", "other"))
        assert a == again != other
        assert pq.ParquetFile(tmp_path / "a" / table).metadata.num_row_groups > 3


def test_classes_balance_and_edges_stay_in_them_as_asked(tables):
    label, src, dst = tables
    counts = np.bincount(label)
    assert len(src) == GRAPH.edges
    assert len(counts) == GRAPH.classes
    assert abs(counts * GRAPH.classes / GRAPH.nodes - 1).max() < 0.06
    assert abs((label[src] == label[dst]).mean() - 0.55) < 0.01
    low, high = (
        PowerLaw(900, 90_000, classes=3, homophily=1 / 3),
        PowerLaw(900, 90_000, classes=3, strays=0, homophily=1),
    )
    for graph in (low, high):
        same = [graph.label(graph.rank_of(b[end].to_numpy())) for b in graph.edge_batches() for end in ("src", "dst")]
        assert abs((same[0] == same[1]).mean() - graph.homophily) < 0.03


def test_degrees_have_the_tail_and_ids_do_not_tell(tables):
    label, src, dst = tables
    degree = np.bincount(np.concatenate([src, dst]), minlength=GRAPH.nodes)
    expected = degree[GRAPH.id_of(np.arange(GRAPH.nodes))]
    assert expected[:50].mean() > 20 * expected[-5000:].mean()  # by rank they fall
    top = np.sort(degree)[::-1]
    assert 2.3 < 1 + 1 / np.log(top[:600] / top[600]).mean() < 3.1  # Hill's estimate of an exponent of 2.5
    assert top[0] < 2 * np.sqrt(2 * GRAPH.edges)
    ids = np.arange(GRAPH.nodes)
    assert abs(np.corrcoef(ids, degree)[0, 1]) < 0.03
    for modulus in (2, GRAPH.classes):
        mixed = np.histogram2d(ids % modulus, label, bins=(modulus, GRAPH.classes))[0] / (len(ids) / modulus)
        assert abs(mixed - mixed.mean(0)).max() < 0.03


def test_ranks_and_ids_are_one_to_one():
    for nodes in (20, 1000, 1009, 46_656):
        graph, rank = PowerLaw(nodes, 10, classes=3), np.arange(nodes)
        assert np.array_equal(np.sort(graph.id_of(rank)), rank)
        assert np.array_equal(graph.rank_of(graph.id_of(rank)), rank)
        block, whole = rank // 3, rank < nodes // 3 * 3
        assert np.array_equal(graph.member(block, graph.circle(rank))[whole], rank[whole])


@pytest.mark.parametrize("wrong", [{"homophily": 0.9}, {"homophily": 0.05}, {"exponent": 2.0}, {"nodes": 5}])
def test_graphs_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"at least two classes|exponent above 2"):
        PowerLaw(**({"nodes": 1000, "edges": 10} | wrong))
