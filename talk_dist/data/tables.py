"""Node and edge tables, read as streams: Parquet and CSV on any ``pyarrow.fs`` path, OGB, tables in memory.

A node table has the columns ``node_id``, ``text`` (or ``encoding``), ``label`` and, optionally, ``split`` and
``label_name``; an edge table has ``src`` and ``dst``. Nothing is checked here beyond what it takes to read: see
validate.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from talk_dist.data import storage
from talk_dist.data.splits import overlap_problems, split_column
from talk_dist.data.tag import SPLITS
from talk_dist.errors import DataError

NODE_COLUMNS = ("node_id", "text", "encoding", "label", "label_name", "split")
EDGE_COLUMNS = ("src", "dst")
BATCH_ROWS = 8192
CSV_BLOCK = 8 << 20  # bytes; one row must fit
ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv"}


@dataclass(frozen=True)
class Table:
    """One table that can be read again and again, a batch at a time.

    ``columns()`` is the names in the table, ``batches(names)`` streams those columns; both raise DataError if a file
    cannot be read. ``untyped`` tables (CSV) give every column as strings, and the validator finds the types.
    """

    where: str  # how messages name it
    columns: Callable[[], list[str]]
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    untyped: bool = False


@dataclass(frozen=True)
class Source:
    """A text-attributed graph to prepare."""

    name: str
    nodes: Table
    edges: Table | None = None  # None: a graph without edges
    split_problems: tuple[str, ...] = ()  # what was wrong with masks or index files that became the split column

    def node_batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The node table from its start; ``columns`` defaults to all of NODE_COLUMNS that it has."""
        return self.nodes.batches(columns or [name for name in self.nodes.columns() if name in NODE_COLUMNS])

    def edge_batches(self) -> Iterator[pa.RecordBatch]:
        """The edge table from its start, columns src and dst."""
        return iter(()) if self.edges is None else self.edges.batches(EDGE_COLUMNS)


def open_tables(nodes: str | os.PathLike[str], edges: str | os.PathLike[str] | None) -> Source:
    """Parquet or CSV (``.csv``, ``.tsv``, also ``.gz``), each a file or a folder of files of one kind.

    Nothing is checked yet: a file that is missing or unreadable is a DataError when the tables are validated.
    """
    path = os.fspath(nodes).rstrip("/")
    stem = os.path.basename(path).split(".")[0]
    name = os.path.basename(os.path.dirname(path)) if stem in ("nodes", "node") else stem
    return Source(name or stem, _open(path), None if edges is None else _open(os.fspath(edges).rstrip("/")))


def from_arrow(nodes: pa.Table, edges: pa.Table | None, name: str = "tables in memory") -> Source:
    """Tables in memory."""
    return Source(name, in_memory(nodes, "nodes table"), None if edges is None else in_memory(edges, "edges table"))


def in_memory(table: pa.Table, where: str) -> Table:
    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return iter(table.select(list(wanted)).to_batches(max_chunksize=BATCH_ROWS))

    return Table(where, lambda: list(table.column_names), batches)


def _open(uri: str) -> Table:
    try:
        untyped = ENDINGS[_ending(_files(uri)[0])] == "csv"
    except DataError:  # told, with all else that is wrong, when the table is read
        untyped = False

    def columns() -> list[str]:
        files = _files(uri)
        names = [_columns(file) for file in files]
        for name in (*NODE_COLUMNS, *EDGE_COLUMNS):
            lacking = [file for file, inside in zip(files, names, strict=True) if name not in inside]
            if 0 < len(lacking) < len(files):
                raise DataError(lacking[0], f"lacks the column {name} of other files there; give it to all or to none")
        return [name for name in names[0] if all(name in other for other in names)]

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for file in _files(uri):
            yield from _read(file, wanted)

    return Table(uri, columns, batches, untyped)


def _ending(name: str) -> str:
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _files(uri: str) -> list[str]:
    """The files of ``uri``, a file or a folder, in order of their names. Raises DataError if there is none to read."""
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise DataError(uri, "no such file or folder; check the path")
    names = [uri]
    if kind == pafs.FileType.Directory:
        inside = filesystem.get_file_info(pafs.FileSelector(path))
        visible = sorted(f.base_name for f in inside if f.is_file and not f.base_name.startswith(("_", ".")))
        names = [storage.join(uri, name) for name in visible]
    kinds = {ENDINGS.get(_ending(name)) for name in names}
    if not names or None in kinds or len(kinds) > 1:
        found = ", ".join(os.path.basename(name) for name in names[:5]) or "nothing"
        raise DataError(
            uri, f"is not one kind of table (found {found}); give .parquet, .csv or .tsv (also .gz), unmixed"
        )
    return names


def _columns(uri: str) -> list[str]:
    filesystem, path = storage.resolve(uri)
    try:
        if ENDINGS[_ending(uri)] == "parquet":
            with filesystem.open_input_file(path) as file:
                return list(pq.ParquetFile(file).schema_arrow.names)
        with filesystem.open_input_stream(path) as stream:
            return list(pacsv.open_csv(stream, pacsv.ReadOptions(block_size=CSV_BLOCK), _parse(uri)).schema.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(uri, error) from error


def _read(uri: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of one file; memory is bounded by a batch, whatever the size of its row groups."""
    if ENDINGS[_ending(uri)] == "csv":
        yield from _read_csv(uri, _parse(uri), columns)
        return
    filesystem, path = storage.resolve(uri)
    try:
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            yield from parquet.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _read_csv(
    uri: str, parse: pacsv.ParseOptions, columns: Sequence[str], headless: bool = False
) -> Iterator[pa.RecordBatch]:
    """``columns`` as strings; a ``headless`` file has no line of names, ``columns`` names all that it has."""
    filesystem, path = storage.resolve(uri)
    read = pacsv.ReadOptions(block_size=CSV_BLOCK, column_names=list(columns) if headless else None)
    convert = pacsv.ConvertOptions(
        include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
    )
    try:
        with filesystem.open_input_stream(path) as stream:
            yield from pacsv.open_csv(stream, read, parse, convert)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _parse(uri: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter="\t" if _ending(uri) == ".tsv" else ",", newlines_in_values=True)


def _unreadable(uri: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    foreign = "UTF8" in reason or isinstance(error, UnicodeDecodeError)
    remedy = "save it in UTF-8" if foreign else "it is cut short or damaged: copy or write it again"
    return DataError(uri, f"cannot be read ({reason}); {remedy}")


_OGB_TEXT = ("paper", "title", "abstract")


def from_ogb(folder: str | os.PathLike[str], texts: str | os.PathLike[str] | None = None) -> Source:
    """ogbn-arxiv's folder as unpacked, with ``titleabs.tsv(.gz)`` (a separate download) inside it or at ``texts``.

    Node ids are OGB's node indices, rows come in the order of the texts, a text is "title. abstract". Raises DataError
    for files that are missing or do not fit together.
    """
    root = os.fspath(folder).rstrip("/")
    files = [
        storage.join(root, part)
        for part in ("raw/edge.csv.gz", "raw/node-label.csv.gz", "mapping/nodeidx2paperid.csv.gz")
    ]
    filesystem, path = storage.resolve(storage.join(root, "split"))
    schemes = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))  # one folder, such as "time"
    scheme = storage.join(root, "split", min((f.base_name for f in schemes if not f.is_file), default="time"))
    files += [storage.join(scheme, f"{name}.csv.gz") for name in ("train", "valid", "test")]
    places = [
        storage.join(root, f"{place}titleabs.tsv{end}") for place in ("", "raw/", "mapping/") for end in (".gz", "")
    ]
    titles = os.fspath(texts) if texts else next(filter(storage.exists, places), places[0])
    missing = [file for file in [*files, titles] if not storage.exists(file)]
    if missing:
        raise DataError(
            root, [f"{file}: no such file; unpack OGB's archive here, and its titleabs.tsv.gz" for file in missing]
        )
    label = _numbers(files[1], ("label",))
    paper = _numbers(files[2], ("node idx", "paper id"), headless=False)
    members = {split: _numbers(file, ("row",)) for split, file in zip(SPLITS, files[3:], strict=True)}
    beyond = [
        f"{s}: has rows up to {m.max()}, beyond the {len(label)} nodes"
        for s, m in members.items()
        if (m >= len(label)).any()
    ]
    if len(paper) != len(label) or beyond:
        raise DataError(root, [*beyond, f"{len(label)} labels for {len(paper)} paper ids; unpack OGB's archive again"])
    columns = {"label": pa.array(label), "split": split_column(len(label), members)}
    order = np.argsort(paper)

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        unseen = np.ones(len(label), bool)
        parse = pacsv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=lambda row: "skip")
        for batch in _read_csv(titles, parse, _OGB_TEXT, headless=True):
            # the file is a tar in disguise, whose header precedes the first id
            ids = pc.replace_substring_regex(batch.column(0), r"^(?s:.*)\x00", "")
            ids = pc.if_else(pc.match_substring_regex(ids, "^[0-9]{1,18}$"), ids, "-1").cast(pa.int64()).to_numpy()
            node = order[np.minimum(np.searchsorted(paper, ids, sorter=order), len(paper) - 1)]
            keep = np.flatnonzero((paper[node] == ids) & unseen[node])
            keep = keep[np.sort(np.unique(node[keep], return_index=True)[1])]  # a paper listed twice counts once
            unseen[node[keep]] = False
            both = pc.binary_join_element_wise(batch.column(1), batch.column(2), ". ")
            yield select(node[keep], both.take(pa.array(keep)), wanted)
        rest = np.flatnonzero(unseen)
        yield select(rest, pa.nulls(len(rest), pa.string()), wanted)

    def select(node: np.ndarray, text: pa.Array, wanted: Sequence[str]) -> pa.RecordBatch:
        values = {"node_id": pa.array(node), "text": text} | {key: c.take(pa.array(node)) for key, c in columns.items()}
        return pa.record_batch({key: values[key] for key in wanted})

    def edge_batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return _read_csv(files[0], _parse(files[0]), EDGE_COLUMNS, headless=True)

    edges = Table(files[0], lambda: list(EDGE_COLUMNS), edge_batches, untyped=True)
    nodes = Table(root, lambda: ["node_id", "text", *columns], batches)
    return Source(os.path.basename(root), nodes, edges, overlap_problems(f"{scheme}/*.csv.gz", members))


def _numbers(uri: str, columns: Sequence[str], headless: bool = True) -> np.ndarray:
    """(n,) int64, the last column of a CSV file of numbers; nan (unlabelled) is -1."""
    chunks = [b.column(b.num_columns - 1) for b in _read_csv(uri, _parse(uri), columns, headless)]
    values = pa.chunked_array(chunks, pa.string()).cast(pa.float64()).to_numpy()
    return np.where(np.isnan(values), -1, values).astype(np.int64)
