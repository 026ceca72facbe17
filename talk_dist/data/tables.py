"""Node and edge tables, read as streams: Parquet and CSV on any ``pyarrow.fs`` path, or tables in memory.

A node table has the columns ``node_id``, ``text``, ``label`` and, optionally, ``split`` and ``label_name``;
an edge table has ``src`` and ``dst``. Nothing is checked here beyond what it takes to read: see validate.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from talk_dist.data import storage
from talk_dist.errors import DataError

NODE_COLUMNS = ("node_id", "text", "label", "label_name", "split")
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
    """A text-attributed graph to prepare. ``problems`` are those that the adapter met while it gathered the tables."""

    name: str
    nodes: Table
    edges: Table | None = None  # None: a graph without edges
    problems: tuple[str, ...] = ()

    def node_batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The node table from its start; ``columns`` defaults to all of NODE_COLUMNS that it has."""
        return self.nodes.batches(columns or [name for name in self.nodes.columns() if name in NODE_COLUMNS])

    def edge_batches(self) -> Iterator[pa.RecordBatch]:
        """The edge table from its start, columns src and dst."""
        return iter(()) if self.edges is None else self.edges.batches(EDGE_COLUMNS)


def open_tables(nodes: str | os.PathLike[str], edges: str | os.PathLike[str] | None) -> Source:
    """Parquet or CSV (``.csv``, ``.tsv``, also ``.gz``), each a file or a folder of files of one kind.

    Nothing is read yet: a file that is missing or unreadable is a DataError when the tables are validated.
    """
    text = os.fspath(nodes).rstrip("/")
    stem = os.path.basename(text).split(".")[0]
    name = os.path.basename(os.path.dirname(text)) if stem in ("nodes", "node") else stem
    return Source(name or stem, _open(text), None if edges is None else _open(os.fspath(edges).rstrip("/")))


def from_arrow(nodes: pa.Table, edges: pa.Table | None, name: str = "tables in memory") -> Source:
    """Tables in memory."""

    def table(value: pa.Table, where: str) -> Table:
        return Table(
            where,
            lambda: list(value.column_names),
            lambda columns: iter(value.select(list(columns)).to_batches(max_chunksize=BATCH_ROWS)),
        )

    return Source(name, table(nodes, "nodes table"), None if edges is None else table(edges, "edges table"))


def _open(uri: str) -> Table:
    try:
        untyped = ENDINGS[_ending(_listing(uri)[0])] == "csv"
    except DataError:  # to be told, with all else that is wrong, when the table is read
        untyped = False

    def columns() -> list[str]:
        names = [_columns(file) for file in _listing(uri)]
        return [name for name in names[0] if all(name in other for other in names)]

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for file in _listing(uri):
            yield from _read(file, wanted)

    return Table(uri, columns, batches, untyped)


def _ending(name: str) -> str:
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _listing(uri: str) -> list[str]:
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
        raise DataError(uri, f"is not one kind of table (found {found}); give .parquet, .csv or .tsv (also .gz), not mixed")
    return names


def _columns(uri: str) -> list[str]:
    filesystem, path = storage.resolve(uri)
    try:
        if ENDINGS[_ending(uri)] == "parquet":
            with filesystem.open_input_file(path) as file:
                return list(pq.ParquetFile(file).schema_arrow.names)
        with filesystem.open_input_stream(path) as stream:
            return list(pacsv.open_csv(stream, parse_options=_parse(uri)).schema.names)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _read(uri: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of one file; memory is bounded by a batch, whatever the size of its row groups."""
    if ENDINGS[_ending(uri)] == "csv":
        convert = pacsv.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
        )
        yield from _read_csv(uri, _parse(uri), convert)
        return
    filesystem, path = storage.resolve(uri)
    try:
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            yield from parquet.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _read_csv(
    uri: str, parse: pacsv.ParseOptions, convert: pacsv.ConvertOptions, header: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """``header`` names the columns of a file that has no first line of names."""
    filesystem, path = storage.resolve(uri)
    read = pacsv.ReadOptions(block_size=CSV_BLOCK, column_names=header)
    try:
        with filesystem.open_input_stream(path) as stream:
            yield from pacsv.open_csv(stream, read, parse, convert)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _parse(uri: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter="\t" if _ending(uri) == ".tsv" else ",", newlines_in_values=True)


def _unreadable(uri: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(uri, f"cannot be read ({reason}); it is cut short or damaged: copy or write it again")


def from_pyg(data: Any, name: str = "data") -> Source:
    """A PyG ``Data`` with texts (``text`` or ``raw_texts``, a list), ``y``, ``edge_index`` and, if any, the three masks.

    Nodes get the ids 0..N-1. Raises DataError if the attributes do not fit together.
    """
    where = f"{name} (PyG Data)"
    given = {key: getattr(data, key, None) for key in ("y", "edge_index", "adj_t", *_MASKS)}
    texts = next((value for key in ("text", "raw_texts") if (value := getattr(data, key, None)) is not None), None)
    problems = []
    if texts is None:
        problems.append("attribute text: missing; set data.text to a list of strings, one a node")
    if given["y"] is None:
        problems.append("attribute y: missing; set data.y to one class a node (-1 = unlabelled)")
    if given["edge_index"] is None and given["adj_t"] is not None:
        problems.append("attribute edge_index: missing, there is adj_t only; set data.edge_index")
    columns = {key: value.cpu().numpy() for key, value in given.items() if value is not None and key in ("y", *_MASKS)}
    size = None if texts is None else len(texts)
    for key, value in columns.items():
        columns[key] = value = value.reshape(-1) if value.shape[1:] in ((), (1,)) else value
        if value.ndim > 1:
            problems.append(f"attribute {key}: has shape {value.shape}; choose one column of it")
        elif size is not None and len(value) != size:
            problems.append(f"attribute {key}: has {len(value)} rows for {size} texts; give one a node")
    if texts is None or problems:
        raise DataError(where, problems)
    label = columns.pop("y")
    masks = {split: columns[key].astype(bool) for key, split in _MASKS.items() if key in columns}
    arrays = {"node_id": pa.array(np.arange(len(texts))), "label": pa.array(np.where(label < 0, -1, label))}
    overlap = _overlap(f"{where}, masks", {split: np.flatnonzero(mask) for split, mask in masks.items()})
    if masks:
        arrays["split"] = _split_column(len(texts), {split: np.flatnonzero(mask) for split, mask in masks.items()})

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for begin in range(0, len(texts), BATCH_ROWS):
            batch = {key: array.slice(begin, BATCH_ROWS) for key, array in arrays.items()}
            batch["text"] = pa.array(list(texts[begin : begin + BATCH_ROWS]), pa.string())
            yield pa.record_batch({key: batch[key] for key in wanted})

    edges = None
    if given["edge_index"] is not None:
        src, dst = given["edge_index"].cpu().numpy()
        edges = from_arrow(pa.table({}), pa.table({"src": src, "dst": dst})).edges
    return Source(name, Table(where, lambda: [*arrays, "text"], batches), edges, overlap)


def from_ogb(folder: str | os.PathLike[str], texts: str | os.PathLike[str] | None = None) -> Source:
    """ogbn-arxiv's folder as unpacked, with ``titleabs.tsv(.gz)`` (a separate download) inside it or at ``texts``.

    Node ids are OGB's node indices, rows come in the order of the texts, a text is "title. abstract".
    Raises DataError for files that are missing.
    """
    root = os.fspath(folder).rstrip("/")
    files = {key: storage.join(root, relative) for key, relative in _OGB_FILES.items()}
    schemes = _subfolders(storage.join(root, "split"))  # one, such as "time"
    for split in SPLITS:
        file = "valid" if split == "val" else split
        files[split] = storage.join(root, "split", schemes[0] if schemes else "*", f"{file}.csv.gz")
    places = [storage.join(root, f"{place}titleabs.tsv{end}") for place in ("", "raw/", "mapping/") for end in (".gz", "")]
    files["texts"] = os.fspath(texts) if texts else next(filter(storage.exists, places), places[0])
    missing = [f"{file}: no such file" for file in files.values() if not storage.exists(file)]
    if missing:
        remedy = "unpack OGB's archive here and put titleabs.tsv.gz (https://snap.stanford.edu/ogb/data/misc/ogbn_arxiv/) beside"
        raise DataError(root, [f"{problem}; {remedy}" for problem in missing])
    label = _numbers(files["label"], ["label"])["label"]
    paper = _numbers(files["paper"], None)["paper id"]
    members = {split: _numbers(files[split], ["row"])["row"] for split in SPLITS}
    where = storage.join(root, "split", schemes[0])
    columns = {
        "label": pa.array(np.where(np.isnan(label), -1, label).astype(np.int64)),
        "split": split_column(where, len(label), members),
    }
    by_paper = np.argsort(paper)

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        unseen = np.ones(len(label), bool)
        strings = pacsv.ConvertOptions(column_types=dict.fromkeys(_OGB_TEXT, pa.string()), strings_can_be_null=False)
        parse = pacsv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=lambda row: "skip")
        for batch in _read_csv(files["texts"], parse, strings, _OGB_TEXT):
            # the file is a tar in disguise: its header precedes the first row
            ids = pc.replace_substring_regex(batch.column("paper"), r"^.*\x00", "")
            known = pc.match_substring_regex(ids, r"^[0-9]{1,18}$")
            place = np.searchsorted(paper, pc.if_else(known, ids, "-1").cast(pa.int64()).to_numpy(), sorter=by_paper)
