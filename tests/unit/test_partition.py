"""The graph's division among shards against slow dense truth."""

from __future__ import annotations

import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talk_dist.data import partition
from talk_dist.data.partition import PartGraph, edge_cut, partition_nodes, split_graph, symmetrise
from talk_dist.errors import ConfigError, DataError


def dense(src: np.ndarray, dst: np.ndarray, num_nodes: int) -> np.ndarray:
    """(N, N) bool: symmetric, with self-loops."""
    adjacency = np.eye(num_nodes, dtype=bool)
    for a, b in zip(src, dst, strict=True):
        adjacency[a, b] = adjacency[b, a] = True
    return adjacency


def hops(adjacency: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(N,) distance from the nearest of ``start``, -1 if out of reach, by breadth-first search on the dense matrix."""
    depth = np.full(len(adjacency), -1)
    depth[start] = 0
    for step in range(1, len(adjacency)):
        near = adjacency[depth == step - 1].any(axis=0) & (depth < 0)
        depth[near] = step
    return depth


def clique_pair(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two cliques joined by one edge, their nodes interleaved (evens, odds)."""
    pairs = [(2 * i + k, 2 * j + k) for i in range(size) for j in range(i) for k in (0, 1)] + [(0, 1)]
    src, dst = np.array(pairs).T
    return src, dst


@st.composite
def graphs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    num_nodes = draw(st.integers(1, 20))
    node = st.integers(0, num_nodes - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=40))  # repeats, both directions, self-loops
    return *np.array(edges, dtype=np.int64).reshape(-1, 2).T, num_nodes


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_symmetrised_csr_is_the_dense_adjacency(graph: tuple[np.ndarray, np.ndarray, int]) -> None:
    src, dst, num_nodes = graph
    indptr, indices = symmetrise(src, dst, num_nodes)
    rows = [indices[indptr[i] : indptr[i + 1]].tolist() for i in range(num_nodes)]
    assert rows == [np.flatnonzero(row).tolist() for row in dense(src, dst, num_nodes)]  # ascending and unique too
    assert indptr.dtype == indices.dtype == np.int64


def check_parts(
    parts: list[PartGraph], adjacency: np.ndarray, assignment: np.ndarray, num_parts: int, halo_hops: int
) -> None:
    """Everything that tag.Partition promises of a part's graph."""
    assert len(parts) == num_parts
    degree = adjacency.sum(axis=1)
    seen = np.zeros_like(adjacency)
    for index, part in enumerate(parts):
        own = np.flatnonzero(assignment == index)
        assert part.node.tolist() == own.tolist()
        depth = hops(adjacency, own)
        halo = np.flatnonzero((depth > 0) & (depth <= halo_hops))
        halo = np.array(sorted(halo, key=lambda node: (depth[node], assignment[node], node)), dtype=np.int64)
        assert part.halo_node.tolist() == halo.tolist()
        assert part.halo_depth.tolist() == depth[halo].tolist()
        assert part.halo_owner.tolist() == assignment[halo].tolist()
        rows_of_owner = [np.flatnonzero(assignment == assignment[node]).tolist().index(node) for node in halo]
        assert part.halo_row.tolist() == rows_of_owner
        local = np.concatenate([own, halo])
        assert part.degree.tolist() == degree[local].tolist()  # of the whole graph
        with_rows = local[np.concatenate([np.zeros(len(own)), depth[halo]]) < halo_hops]
        assert len(part.indptr) == len(with_rows) + 1
        for row, node in enumerate(with_rows):
            columns = part.indices[part.indptr[row] : part.indptr[row + 1]]
            assert (np.diff(columns) > 0).all()
            assert sorted(local[columns]) == np.flatnonzero(adjacency[node]).tolist()
            if row < len(own):
                seen[node, local[columns]] = True
        kinds = {name: value.dtype.name for name, value in part.arrays().items()}
        wide = dict.fromkeys(("indptr", "degree", "halo_node", "halo_row"), "int64")
        assert kinds == {**wide, "indices": "int32", "halo_owner": "int32", "halo_depth": "int8"}
    assert (seen == adjacency).all()  # the own rows put together are the graph


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([1, 2, 7]), st.sampled_from([1, 2, 3]), st.randoms())
def test_parts_put_together_are_the_dense_graph(
    graph: tuple[np.ndarray, np.ndarray, int], num_parts: int, halo_hops: int, random: object
) -> None:
    src, dst, num_nodes = graph
    assignment = np.array([random.randrange(num_parts) for _ in range(num_nodes)], dtype=np.int32)  # type: ignore[attr-defined]
    parts = list(split_graph(*symmetrise(src, dst, num_nodes), assignment, num_parts, halo_hops))
    check_parts(parts, dense(src, dst, num_nodes), assignment, num_parts, halo_hops)


@settings(max_examples=30, deadline=None)
@given(graphs(), st.integers(1, 7))
def test_edge_cut_counts_undirected_edges_between_parts(
    graph: tuple[np.ndarray, np.ndarray, int], num_parts: int
) -> None:
    src, dst, num_nodes = graph
    assignment = np.arange(num_nodes, dtype=np.int32) % num_parts
    a, b = np.nonzero(np.triu(dense(src, dst, num_nodes)))
    assert edge_cut(*symmetrise(src, dst, num_nodes), assignment) == (assignment[a] != assignment[b]).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_hash_parts_are_even_and_always_the_same(num_nodes: int, num_parts: int) -> None:
    num_parts = min(num_parts, num_nodes)
    none = np.zeros(0, np.int64)
    indptr, indices = symmetrise(none, none, num_nodes)
    assignment, _, _ = partition_nodes(indptr, indices, num_parts, "hash")
    sizes = np.bincount(assignment, minlength=num_parts)
    assert sizes.max() - sizes.min() <= 1
    assert (assignment == partition_nodes(indptr, indices, num_parts, "hash")[0]).all()


def test_metis_finds_the_two_cliques_and_repeats_itself() -> None:
    indptr, indices = symmetrise(*clique_pair(12), 24)
    assignment, method, _ = partition_nodes(indptr, indices, 2, "auto")
    assert method == "metis"
    assert edge_cut(indptr, indices, assignment) == 1
    assert assignment.dtype == np.int32
    assert (assignment == partition_nodes(indptr, indices, 2, "metis")[0]).all()
    hashed, method, _ = partition_nodes(indptr, indices, 2, "hash")
    assert method == "hash"
    assert edge_cut(indptr, indices, hashed) > 20


def test_hub_of_all_nodes_is_partitioned_without_empty_parts() -> None:
    spokes = np.arange(1, 400)
    indptr, indices = symmetrise(np.zeros_like(spokes), spokes, 400)
    assignment, method, _ = partition_nodes(indptr, indices, 7, "metis")
    assert method == "metis"
    assert np.bincount(assignment, minlength=7).min() > 0
    parts = list(split_graph(indptr, indices, assignment, 7, halo_hops=2))
    check_parts(parts, dense(np.zeros_like(spokes), spokes, 400), assignment, 7, 2)


def test_empty_parts_of_metis_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    indptr, indices = symmetrise(*clique_pair(12), 24)
    monkeypatch.setattr(partition, "_run_metis", lambda *_: np.repeat(np.array([0, 3], dtype=np.int32), [20, 4]))
    assignment, _, _ = partition_nodes(indptr, indices, 5, "metis")
    assert np.bincount(assignment, minlength=5).tolist() == [17, 1, 1, 4, 1]


@pytest.mark.parametrize(
    ("num_nodes", "edges", "parts", "limit", "reason"),
    [
        (40, 0, 2, None, "no edges"),
        (10, 20, 7, None, "too few"),
        (40, 60, 2, 10, "more than METIS gets"),
        (40, 60, 1, None, "one part"),
    ],
)
def test_auto_says_why_it_does_not_use_metis(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int, edges: int, parts: int, limit: int | None, reason: str
) -> None:
    monkeypatch.setattr(partition, "METIS_COMMAND", ["/nonexistent/metis"])  # it would not even start
    if limit:
        monkeypatch.setattr(partition, "METIS_EDGES", limit)
    ends = np.random.default_rng(0).integers(0, num_nodes, (2, edges))
    _, method, why = partition_nodes(*symmetrise(*ends, num_nodes), parts, "auto")
    assert method == ("none" if parts == 1 else "hash")
    assert reason in why


SEGFAULT = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
COMPLAINS = [sys.executable, "-c", "raise MemoryError('no memory for the coarse graph')"]
SILENT = [sys.executable, "-c", "pass"]
WRONG = [
    sys.executable,
    "-c",
    "import sys, numpy as np; np.save(sys.argv[1] + '/parts.npy', np.full(24, 9, np.int32))",
]


@pytest.mark.parametrize(
    ("command", "says"),
    [(SEGFAULT, "signal 11"), (COMPLAINS, "no memory for the coarse"), (SILENT, "no result"), (WRONG, "do not fit")],
)
def test_crash_of_metis_is_an_error_or_a_fallback(
    monkeypatch: pytest.MonkeyPatch, command: list[str], says: str
) -> None:
    indptr, indices = symmetrise(*clique_pair(12), 24)
    monkeypatch.setattr(partition, "METIS_COMMAND", command)
    with pytest.raises(DataError, match=f"{says}.*use method 'hash'"):
        partition_nodes(indptr, indices, 2, "metis")
    with pytest.warns(RuntimeWarning, match=f"{says}.*partitioned by hash"):
        assignment, method, why = partition_nodes(indptr, indices, 2, "auto")
    assert (method, why) == ("hash", "METIS failed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (assignment == partition_nodes(indptr, indices, 2, "hash")[0]).all()


@pytest.mark.parametrize(("parts", "method"), [(0, "auto"), (25, "auto"), (2, "metsi")])
def test_impossible_settings_are_config_errors(parts: int, method: str) -> None:
    with pytest.raises(ConfigError, match=r"24|metsi"):
        partition_nodes(*symmetrise(*clique_pair(12), 24), parts, method)


def test_symmetrise_memory_is_a_small_multiple_of_the_edges() -> None:
    num_edges = 200_000
    ends = np.random.default_rng(0).integers(0, 20_000, (2, num_edges))
    tracemalloc.start()
    symmetrise(*ends, 20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * num_edges  # bytes: 100 M edges fit in 8 GB
