"""The pass over the edge table: both ends of every edge as rows of the node table."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from talk_dist.data.columns import TWICE, is_text, missing_columns, plain, whole_numbers
from talk_dist.data.splits import show
from talk_dist.data.tables import EDGE_COLUMNS, Table
from talk_dist.errors import DataError

SPARSE = 4  # ids spread over so many numbers a node are found by their hash, denser ones in a table


def read_edges(table: Table | None, node_id: pa.Array | None, problems: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of every edge as node rows; without ``node_id`` only the presence of the columns is checked."""
    rows = {name: np.zeros(0, np.int64) for name in EDGE_COLUMNS}
    lost: dict[str, Counter[Any]] = {name: Counter() for name in EDGE_COLUMNS}
    if table is None:
        return rows["src"], rows["dst"]
    places = {name: f"{table.where}, column {name}" for name in EDGE_COLUMNS}
    try:
        present = table.columns()
        absent = missing_columns(table.where, present, EDGE_COLUMNS, problems)
        for name in EDGE_COLUMNS:
            if present.count(name) > 1:
                raise DataError(places[name], TWICE)
        batches = () if absent or node_id is None else table.batches(EDGE_COLUMNS)
        columns: dict[str, list[pa.Array]] = {name: [] for name in EDGE_COLUMNS}
        for batch in batches:
            for name, chunks in columns.items():
                chunks += [batch.column(name)] if batch.num_rows else []
        del batches
        for name, where in places.items():
            try:
                chunks = [plain(chunk) for chunk in columns.pop(name)]
            except TypeError as error:
                raise DataError(where, str(error)) from error
            if len({chunk.type for chunk in chunks}) > 1:
                raise DataError(where, "has another type in another file; make all alike")
            if chunks:
                rows[name] = _find(pa.chunked_array(chunks), node_id, table.untyped, where, lost[name])
    except DataError as error:
        problems.extend(f"{error.where}: {problem}" for problem in error.problems)
    for name, values in lost.items():
        if values:
            what = f"{values.total()} edges end at {len(values)} ids that no node has ({show(values)})"
            problems.append(f"{places[name]}: {what}; add these nodes or drop the edges")
    return rows["src"], rows["dst"]


def _find(column: pa.ChunkedArray, node_id: pa.Array, untyped: bool, where: str, lost: Counter[Any]) -> np.ndarray:
    """Node rows of ``column``, ids that no node has counted in ``lost``. Raises DataError for ids of another type."""
    if untyped and pa.types.is_integer(node_id.type):
        wanted = pc.if_else(whole_numbers(column), column, None).cast(pa.int64())
    elif is_text(column.type) if is_text(node_id.type) else pa.types.is_integer(column.type):
        try:
            wanted = column.cast(node_id.type)
        except pa.ArrowInvalid as error:  # unsigned and beyond int64
            raise DataError(where, f"has ids that no node can have ({error}); use signed 64-bit integers") from error
    else:
        raise DataError(where, f"is {column.type}, but node_id is {node_id.type}; make both integers or both strings")
    if pa.types.is_integer(node_id.type) and (table := _dense(node_id.to_numpy())) is not None:
        rows = _look_up(wanted, *table)
    else:
        rows = pc.index_in(wanted, value_set=node_id).cast(pa.int64()).fill_null(-1).to_numpy()
    unknown = rows < 0
    if unknown.any():
        lost.update(column.filter(pa.array(unknown)).to_pylist())
        rows = rows[~unknown]
    return rows


def _dense(node_id: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The smallest id, and the row (or -1) of every number from it to the largest; None if most numbers are no id."""
    if not len(node_id):
        return None
    smallest, largest = int(node_id.min()), int(node_id.max())
    if largest - smallest >= SPARSE * len(node_id):
        return None
    rows = np.full(largest - smallest + 1, -1, np.int64)
    rows[node_id - smallest] = np.arange(len(node_id))
    return smallest, rows


def _look_up(wanted: pa.ChunkedArray, smallest: int, rows: np.ndarray) -> np.ndarray:
    """Node rows of ids, -1 of those that no node has."""
    found, done = np.full(len(wanted), -1, np.int64), 0
    for chunk in wanted.chunks:
        ids, part = chunk.fill_null(smallest).to_numpy(), found[done : done + len(chunk)]
        inside = (ids >= smallest) & (ids <= smallest + len(rows) - 1)
        part[inside] = rows[ids[inside] - smallest]
        if chunk.null_count:
            part[chunk.is_null().to_numpy(zero_copy_only=False)] = -1
        done += len(chunk)
    return found
