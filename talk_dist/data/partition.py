"""The graph as CSR, its division among shards, and each shard's part with the halo around it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from talk_dist.data.splits import hash_ids
from talk_dist.errors import ConfigError, DataError

METHODS = ("auto", "metis", "hash")
METIS_EDGES = 50_000_000  # beyond this METIS needs tens of gigabytes
METIS_NODES_PER_PART = 4  # below this its parts are empty or arbitrary
METIS_CHILD = """
import sys
import numpy, pymetis
folder, parts = sys.argv[1:]
graph = pymetis.CSRAdjacency(numpy.load(folder + "/indptr.npy"), numpy.load(folder + "/indices.npy"))
cut, assignment = pymetis.part_graph(int(parts), graph, options=pymetis.Options(seed=0))
numpy.save(folder + "/parts.npy", numpy.asarray(assignment, dtype=numpy.int32))
"""  # a script, not a module of this package, whose import would bring torch
METIS_COMMAND = [sys.executable, "-c", METIS_CHILD]  # followed by: folder of arrays, parts


def symmetrise(src: np.ndarray, dst: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR ``(indptr (N + 1,), indices (2E + N,))``, int64, of the undirected graph with one self-loop a node.

    Repeats, directions and self-loops of the input do not matter. Columns ascend within a row. Peak memory is
    about 56 bytes for each edge of the input, with the output but without the input.
    """
    low, high = np.minimum(src, dst), np.maximum(src, dst)
    proper = low != high
    low *= num_nodes
    low += high
    keys = low[proper]
    del low, high, proper
    keys = _sorted_unique(keys)
    low, high = np.divmod(keys, max(num_nodes, 1))
    del keys
    below, above = np.bincount(high, minlength=num_nodes), np.bincount(low, minlength=num_nodes)
    indptr = np.zeros(num_nodes + 1, np.int64)
    np.cumsum(below + above + 1, out=indptr[1:])
    indices = np.empty(indptr[-1], np.int64)
    # row i: its smaller neighbours, i itself, its larger neighbours
    indices[indptr[:-1] + below] = np.arange(num_nodes)
    begin = np.cumsum(above) - above  # of the run of i among keys sorted by (low, high)
    _place(indices, (indptr[:-1] + below + 1 - begin)[low], high)
    turned = high * num_nodes
    turned += low
    del low, high
    turned.sort()
    high, low = np.divmod(turned, max(num_nodes, 1))
    del turned
    begin = np.cumsum(below) - below
    _place(indices, (indptr[:-1] - begin)[high], low)
    return indptr, indices


def _place(indices: np.ndarray, shift: np.ndarray, values: np.ndarray) -> None:
    """Entry i of ``values`` goes to i + shift[i]; ``shift`` is used up."""
    shift += np.arange(len(shift))
    indices[shift] = values


def _sorted_unique(keys: np.ndarray) -> np.ndarray:
    keys.sort()
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first]


def partition_nodes(
    indptr: np.ndarray, indices: np.ndarray, parts: int, method: str = "auto"
) -> tuple[np.ndarray, str, str]:
    """``(assignment (N,) int32, the method used, why)``; no part is empty. The same graph gives the same parts.

    ``"metis"`` keeps neighbours together and runs in a process of its own, since a crash inside it would take this
    one along; ``"hash"`` scatters the row numbers evenly; ``"auto"`` is METIS where it is fit, else hash.
    Raises ConfigError for an unknown method or more parts than nodes, DataError if ``"metis"`` fails.
    """
    num_nodes = len(indptr) - 1
    if method not in METHODS:
        raise ConfigError(f"partition method is {method!r}; use one of {', '.join(METHODS)}")
    if not 1 <= parts <= num_nodes:
        raise ConfigError(f"parts is {parts}, but the graph has {num_nodes} nodes; use 1 to {num_nodes} parts")
    if parts == 1:
        return np.zeros(num_nodes, np.int32), "none", "one part"
    if method == "hash":
        return _hash_parts(num_nodes, parts), "hash", "asked for"
    edges = (len(indices) - num_nodes) // 2
    if method == "auto":
        unfit = _unfit(num_nodes, edges, parts)
        if unfit:
            return _hash_parts(num_nodes, parts), "hash", unfit
    try:
        assignment = _run_metis(indptr, indices, parts)
    except DataError as error:
        if method == "metis":
            raise
        warnings.warn(f"{error}; nodes are partitioned by hash, with a larger halo", RuntimeWarning, stacklevel=2)
        return _hash_parts(num_nodes, parts), "hash", "METIS failed"
    return _fill_empty(assignment, parts), "metis", "asked for" if method == "metis" else "fit"


def _unfit(num_nodes: int, edges: int, parts: int) -> str | None:
    if edges == 0:
        return "there are no edges"
    if edges > METIS_EDGES:
        return f"{edges} edges are more than METIS gets ({METIS_EDGES})"
    if num_nodes < METIS_NODES_PER_PART * parts:
        return f"{num_nodes} nodes are too few for {parts} parts by METIS"
    return None


def _hash_parts(num_nodes: int, parts: int) -> np.ndarray:
    """Row numbers in the order of their hashes, dealt out in turn: sizes differ by one at most."""
    assignment = np.empty(num_nodes, np.int32)
    assignment[np.argsort(hash_ids(np.arange(num_nodes), 0))] = np.arange(num_nodes) % parts
    return assignment


def _run_metis(indptr: np.ndarray, indices: np.ndarray, parts: int) -> np.ndarray:
    """(N,) int32 from METIS in a child process. Raises DataError if the child fails, whatever the way."""
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    with tempfile.TemporaryDirectory(prefix="talk-dist-metis-") as folder:
        np.save(f"{folder}/indptr.npy", indptr - np.arange(len(indptr)))  # METIS wants no self-loops
        np.save(f"{folder}/indices.npy", indices[indices != rows])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        child = subprocess.run([*METIS_COMMAND, folder, str(parts)], capture_output=True, env=environment, check=False)
        if child.returncode:
            how = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
            last = (child.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise DataError("METIS", f"failed on this graph ({how}: {last}); use method 'hash' or 'auto'")
        try:
            assignment = np.load(f"{folder}/parts.npy")
        except (OSError, ValueError) as error:
            raise DataError("METIS", f"left no result ({error}); use method 'hash' or 'auto'") from error
    if assignment.shape != (len(indptr) - 1,) or assignment.min() < 0 or assignment.max() >= parts:
        raise DataError("METIS", "gave parts that do not fit the graph; use method 'hash' or 'auto'")
    return assignment.astype(np.int32)


def _fill_empty(assignment: np.ndarray, parts: int) -> np.ndarray:
    """METIS may leave parts empty: give each the last node of what is then the largest part."""
    sizes = np.bincount(assignment, minlength=parts)
    for part in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        assignment[np.flatnonzero(assignment == largest)[-1]] = part
        sizes[largest] -= 1
        sizes[part] += 1
    return assignment


@dataclass(frozen=True)
class PartGraph:
    """The graph of one partition: the arrays of tag.Partition that are about edges, in its order and dtypes."""

    node: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    degree: np.ndarray
    halo_node: np.ndarray
    halo_owner: np.ndarray
    halo_row: np.ndarray
    halo_depth: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What graph.safetensors holds: everything but ``node``."""
        return {name: value for name, value in vars(self).items() if name != "node"}


def split_graph(
    indptr: np.ndarray, indices: np.ndarray, assignment: np.ndarray, parts: int, halo_hops: int
) -> Iterator[PartGraph]:
    """The partitions in order, one in memory at a time, each with all nodes within ``halo_hops`` of its own."""
    num_nodes = len(indptr) - 1
    degree = np.diff(indptr)
    if parts == 1:  # as it is: of a large graph the sorting below would take longest of all, and most memory
        none, columns = np.zeros(0, np.int64), _narrow(indices, num_nodes)
        no_halo = none, none.astype(np.int32), none, none.astype(np.int8)
        yield PartGraph(np.arange(num_nodes), indptr, columns, degree, *no_halo)
        return
    by_owner = np.argsort(assignment, kind="stable")  # within a part ascending
    bounds = np.searchsorted(assignment[by_owner], np.arange(parts + 1))
    row_of = np.empty(num_nodes, np.int64)
    row_of[by_owner] = np.arange(num_nodes) - np.repeat(bounds[:-1], np.diff(bounds))
    column_of = np.full(num_nodes, -1, np.int64)  # local column in the present part, or -1: cleared after each part
    for part in range(parts):
        own = by_owner[bounds[part] : bounds[part + 1]]
        layers = [own]  # nodes by depth: own, then the halo
        column_of[own] = 0
        for _ in range(halo_hops):
            reached = np.unique(_rows(indptr, indices, layers[-1]))
            reached = reached[column_of[reached] < 0]
            column_of[reached] = 0
            layers.append(reached[np.argsort(assignment[reached], kind="stable")])
        halo = np.concatenate(layers[1:])
        local = np.concatenate([own, halo])
        column_of[local] = np.arange(len(local))
        with_rows = np.concatenate(layers[:-1])
        columns = column_of[_rows(indptr, indices, with_rows)]
        counts = degree[with_rows]
        # ascending within a row: sort (row, column) as one number
        keys = np.repeat(np.arange(len(with_rows)) * len(local), counts) + columns
        keys.sort()
        yield PartGraph(
            node=own,
            indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            indices=_narrow(keys % max(len(local), 1), len(local)),
            degree=degree[local],
            halo_node=halo,
            halo_owner=assignment[halo].astype(np.int32),
            halo_row=row_of[halo],
            halo_depth=np.repeat(np.arange(1, halo_hops + 1, dtype=np.int8), [len(layer) for layer in layers[1:]]),
        )
        column_of[local] = -1


def _narrow(columns: np.ndarray, count: int) -> np.ndarray:
    """Columns below ``count`` in half the memory, where they fit."""
    return columns.astype(np.int32) if count <= np.iinfo(np.int32).max else columns


def _rows(indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The entries of ``rows`` one after another."""
    counts = indptr[rows + 1] - indptr[rows]
    starts = np.repeat(indptr[rows] - (np.cumsum(counts) - counts), counts)
    return indices[starts + np.arange(len(starts))]


def edge_cut(indptr: np.ndarray, indices: np.ndarray, assignment: np.ndarray) -> int:
    """Undirected edges whose ends are in different parts."""
    if not assignment.any():  # one part
        return 0
    return int((np.repeat(assignment, np.diff(indptr)) != assignment[indices]).sum()) // 2
