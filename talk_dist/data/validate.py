"""Check the tables of a text-attributed graph in one pass, and say everything that is wrong with them at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from talk_dist.data import given
from talk_dist.data.columns import TWICE, integers, is_text, missing_columns, plain, whole_numbers
from talk_dist.data.edges import read_edges
from talk_dist.data.splits import absent_problems, read_split, show
from talk_dist.data.tables import NODE_COLUMNS, Source, Table
from talk_dist.errors import DataError

REQUIRED = ("node_id", "text", "label")
WRITTEN_NUMBER = r"^(0|-?[1-9][0-9]{0,17})(\.0+)?$"  # as pandas writes integers of a column that has holes
NEEDED = f"node_id, text (or {given.COLUMN}, in Parquet), label"


@dataclass(frozen=True)
class CheckedGraph:
    """What is known of a graph after its one pass: everything but the texts. Rows are those of the node table."""

    node_id: pa.Array  # (N,) int64 or large_string
    label: np.ndarray  # (N,) int32, index into classes, -1 = unlabelled
    classes: list[str]
    split: np.ndarray | None  # (N,) int8, what the split column says; None: there is none, it is blank or unwanted
    src: np.ndarray  # (E,) int64 node rows, as listed: directed, with repeats and self-loops
    dst: np.ndarray  # (E,) int64
    text_bytes: int  # UTF-8; of encodings in place of texts, what they take as float16
    width: int | None = None  # of these encodings


def validate(source: Source, use_split_column: bool = True) -> CheckedGraph:
    """Read both tables once, holding ids, labels and edges but never the texts, or the encodings in their place.

    Raises one DataError that lists every problem, each with its file, column, count, first offending values and remedy.
    """
    problems = list(source.split_problems) if use_split_column else []
    scan = _NodeScan(source.nodes, use_split_column)
    complete = scan.read(problems)
    node_id = scan.node_ids(problems) if complete and "node_id" not in scan.broken else None
    scan.tell_blank_texts(node_id, problems)
    scan.tell_encodings(node_id, problems)
    label, classes = scan.labels(problems) if "label" not in scan.broken else (np.zeros(0, np.int32), [])
    split = scan.splits(problems) if "split" not in scan.broken else None
    src, dst = read_edges(source.edges, node_id, problems)
    where = f"{source.nodes.where}, column"
    if complete and "label" not in scan.broken:
        if not classes:
            problems.append(f"{where} label: none of {scan.rows} nodes has one; label some (0, 1, … or a class name)")
        elif split is not None and not scan.unknown_splits:
            problems += absent_problems(
                f"{where} split", label, split, classes, "split at random (use_split_column=False)"
            )
    if problems or node_id is None:
        raise DataError(source.name, problems)
    width = scan.encodings.width
    size = scan.text_bytes if width is None else 2 * width * scan.rows
    return CheckedGraph(node_id, label, classes, split, src, dst, size, width)


def brings_encodings(columns: Sequence[str]) -> bool:
    """Whether a node table with these columns has encodings in place of texts."""
    return given.COLUMN in columns and "text" not in columns


@dataclass
class _NodeScan:
    """The pass over the node table: a method for each column takes it batch by batch, another concludes."""

    table: Table
    use_split: bool
    rows: int = 0
    text_bytes: int = 0
    ids: list[pa.Array] = field(default_factory=list)
    blank_texts: list[np.ndarray] = field(default_factory=list)  # row numbers
    encodings: given.EncodingScan = field(default_factory=given.EncodingScan)
    codes: list[np.ndarray] = field(default_factory=list)  # labels: the integer, or the index into names
    names: dict[str, int] = field(default_factory=dict)  # labels that are strings
    label_kinds: set[str] = field(default_factory=set)
    label_names: set[tuple[str, str]] = field(default_factory=set)  # (label, name)
    split_codes: list[np.ndarray] = field(default_factory=list)
    unknown_splits: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)  # column → why it cannot be used at all

    def read(self, problems: list[str]) -> bool:
        """Whether the table could be read to its end."""
        where = self.table.where
        try:
            present = self.table.columns()
            content = given.COLUMN if brings_encodings(present) else "text"
            required = [content if name == "text" else name for name in REQUIRED]
            missing = missing_columns(where, present, required, problems, NEEDED)
            self.broken.update(dict.fromkeys(missing, "missing"))
            unread = {"text", given.COLUMN, "split"} - {content, "split" if self.use_split else content}
            wanted = [name for name in NODE_COLUMNS if name in present and name not in unread]
            self.broken.update({name: TWICE for name in wanted if present.count(name) > 1})
            wanted = [name for name in wanted if name not in self.broken]
            for batch in self.table.batches(wanted) if wanted else ():
                self._add(batch)
        except DataError as error:
            problems.extend(f"{error.where}: {problem}" for problem in error.problems)
            return False
        problems.extend(f"{where}, column {c}: {what}" for c, what in self.broken.items() if what != "missing")
        if self.rows == 0 and wanted:
            problems.append(f"{where}: has no rows; a graph needs at least one node")
        return self.rows > 0

    def _add(self, batch: pa.RecordBatch) -> None:
        columns: dict[str, pa.Array] = {}
        takers = {
            "node_id": self._add_ids,
            "text": self._add_texts,
            given.COLUMN: lambda column: self.encodings.add(column, self.rows),
            "label": self._add_labels,
            "label_name": _check_name,
            "split": self._add_splits,
        }
        for name in batch.schema.names:
            if name in self.broken:
                continue
            try:
                columns[name] = plain(batch.column(name))
                takers[name](columns[name])
            except (pa.ArrowException, TypeError) as error:
                self.broken[name] = str(error).strip()
        if {"label", "label_name"} <= columns.keys() - self.broken.keys():
            pairs = pa.table({"label": columns["label"], "name": columns["label_name"]}).group_by(["label", "name"])
            for pair in pairs.aggregate([]).to_pylist():
                label = pair["label"]
                if pair["name"] and label is not None and label == label:  # not NaN, as pandas writes a hole
                    self.label_names.add((str(int(label) if isinstance(label, float) else label), str(pair["name"])))
        self.rows += batch.num_rows

    def _add_ids(self, column: pa.Array) -> None:
        if not is_text(column.type) and not pa.types.is_integer(column.type):
            raise TypeError(f"is {column.type}; make it integers or strings")
        blank = pc.is_null(column) if pa.types.is_integer(column.type) else pc.fill_null(pc.equal(column, ""), True)
        if pc.any(blank).as_py():
            row = self.rows + pc.index(blank, True).as_py()
            raise TypeError(
                f"has {pc.sum(blank).as_py()} or more nulls (the first in row {row}); give every node an id"
            )
        ids = column.cast(pa.large_string()) if is_text(column.type) else integers(column)
        if self.ids and self.ids[0].type != ids.type:
            raise TypeError("is integers in one file and strings in another; make all of them alike")
        self.ids.append(ids)

    def _add_texts(self, column: pa.Array) -> None:
        if not is_text(column.type) and not pa.types.is_null(column.type):
            raise TypeError(f"is {column.type}; make it strings")
        column = column.cast(pa.large_string())
        self.text_bytes += pc.sum(pc.binary_length(column)).as_py() or 0
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
        self.blank_texts.append(np.flatnonzero(blank.to_numpy(zero_copy_only=False)) + self.rows)

    def _add_labels(self, column: pa.Array) -> None:
        kind = column.type
        if is_text(kind):
            encoded, names = column.dictionary_encode(), self.names
            values = [
                -1 if name in ("", "-1") else names.setdefault(name, len(names))
                for name in encoded.dictionary.to_pylist()
            ]
            codes = np.array([*values, -1], dtype=np.int64)[encoded.indices.fill_null(len(values)).to_numpy()]
            self.label_kinds.add("strings")
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
            if pa.types.is_floating(kind):  # integers with holes, as pandas writes them
                column = pc.if_else(pc.is_nan(column), None, column)
                odd = column.filter(pc.not_equal(pc.floor(column), column))
                if len(odd):
                    raise TypeError(f"has fractions ({show(odd.to_pylist())}); make it integers or strings")
            codes = integers(column).fill_null(-1).to_numpy()
            if not pa.types.is_null(kind):
                self.label_kinds.add("integers")
        else:
            raise TypeError(f"is {kind}; make it integers (-1 = unlabelled) or strings")
        if len(self.label_kinds) > 1:
            raise TypeError("is integers in one file and strings in another; make all of them alike")
        self.codes.append(codes)

    def _add_splits(self, column: pa.Array) -> None:
        self.split_codes.append(read_split(column, self.unknown_splits))

    def node_ids(self, problems: list[str]) -> pa.Array:
        """(N,) int64 or large_string."""
        node_id = pa.concat_arrays(self.ids)
        if self.table.untyped and pc.all(whole_numbers(node_id)).as_py():
            node_id = node_id.cast(pa.int64())
        if _repeats(node_id):
            counts = pc.value_counts(node_id)
            repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
            what = f"{len(repeated)} ids are on several rows ({show(repeated[:6].to_pylist())})"
            problems.append(f"{self.table.where}, column node_id: {what}; drop the duplicate rows")
        return node_id

    def tell_blank_texts(self, node_id: pa.Array | None, problems: list[str]) -> None:
        rows = np.concatenate(self.blank_texts) if self.blank_texts else np.zeros(0, np.int64)
        if len(rows):
            what = f"{len(rows)} texts are empty or null ({_named(node_id, rows.tolist())})"
            problems.append(f"{self.table.where}, column text: {what}; write a text or drop the node")

    def tell_encodings(self, node_id: pa.Array | None, problems: list[str]) -> None:
        where = f"{self.table.where}, column {given.COLUMN}"
        problems += self.encodings.problems(where, lambda rows: _named(node_id, rows))

    def labels(self, problems: list[str]) -> tuple[np.ndarray, list[str]]:
        """(N,) int32 indices into the class names: integers in numeric order, strings sorted."""
        codes = np.concatenate(self.codes) if self.codes else np.zeros(0, np.int64)
        names = list(self.names)
        if self.table.untyped and all(name.lower() == "nan" or re.match(WRITTEN_NUMBER, name) for name in names):
            numbers = [-1 if name.lower() == "nan" else int(name.partition(".")[0]) for name in names]
            codes = np.array([*numbers, -1], dtype=np.int64)[codes]
            names = []
        if names:
            rank = {name: i for i, name in enumerate(sorted(names))}
            return np.array([*map(rank.__getitem__, names), -1], dtype=np.int32)[codes], list(rank)
        odd = codes[codes < -1]
        if len(odd):
            what = f"{len(odd)} nodes have labels below -1 ({show(np.unique(odd).tolist())}); -1 is unlabelled"
            problems.append(f"{self.table.where}, column label: {what}")
        values = np.unique(codes[codes >= 0])
        label = np.where(codes >= 0, np.searchsorted(values, codes), -1).astype(np.int32)
        return label, self._class_names([str(v) for v in values.tolist()], problems)

    def _class_names(self, values: list[str], problems: list[str]) -> list[str]:
        where = f"{self.table.where}, column label_name"
        of_value: dict[str, list[str]] = {value: [] for value in values}
        for value, name in sorted({(value.partition(".")[0], name) for value, name in self.label_names}):
            of_value.get(value, []).append(name)
        unsure = [f"{value}: {', '.join(names)}" for value, names in of_value.items() if len(names) > 1]
        if unsure:
            problems.append(
                f"{where}: {len(unsure)} labels have several names ({show(unsure)}); give each label one name"
            )
        classes = [names[0] if names else value for value, names in of_value.items()]
        twice = [name for name, count in Counter(classes).items() if count > 1]
        if twice:
            problems.append(f"{where}: {len(twice)} names stand for several labels ({show(twice)}); rename them")
        return classes

    def splits(self, problems: list[str]) -> np.ndarray | None:
        """(N,) int8, or None if no node is in a split."""
        if self.unknown_splits:
            what = f"{self.unknown_splits.total()} unknown values ({show(self.unknown_splits)})"
            problems.append(f"{self.table.where}, column split: {what}; use train, val, test or an empty string")
        split = np.concatenate(self.split_codes) if self.split_codes else np.zeros(0, np.int8)
        return split if (split >= 0).any() else None


def _check_name(column: pa.Array) -> None:
    if pa.types.is_nested(column.type):
        raise TypeError(f"is {column.type}; make it strings")


def _repeats(node_id: pa.Array) -> bool:
    """Whether an id is there twice. Numbers are sorted, in a tenth of the memory and time of a table of them."""
    if pa.types.is_integer(node_id.type):
        ids = np.sort(node_id.to_numpy())
        return bool((ids[1:] == ids[:-1]).any())
    return bool(pc.count_distinct(node_id).as_py() < len(node_id))


def _named(node_id: pa.Array | None, rows: Sequence[int]) -> str:
    """Nodes by their ids, or by their rows where these are unknown."""
    if node_id is None:
        return f"rows {show(rows)}"
    return f"node_id {show(node_id.take(pa.array(rows[:6])).to_pylist())}"
