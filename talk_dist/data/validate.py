"""Check the tables of a text-attributed graph in one pass, and say everything that is wrong with them at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from talk_dist.data.splits import absent_classes
from talk_dist.data.tables import EDGE_COLUMNS, Source, Table
from talk_dist.errors import DataError

REQUIRED = ("node_id", "text", "label")
SPLIT_VALUES = {None: -1, "": -1, "train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
WHOLE_NUMBER = r"^(0|-?[1-9][0-9]{0,18})$"
LOOKUP_ROWS = 1 << 22  # edges looked up at once: enough that building the table of ids is paid for


@dataclass(frozen=True)
class CheckedGraph:
    """What is known of a graph after its one pass: everything but the texts. Node rows are in the order of the table."""

    node_id: pa.Array  # (N,) int64 or large_string
    label: np.ndarray  # (N,) int32, index into classes, -1 = unlabelled
    classes: list[str]
    split: np.ndarray | None  # (N,) int8 as the split column says; None: there is none, or it is blank or unwanted
    src: np.ndarray  # (E,) int64 node rows, as listed: directed, with repeats and self-loops
    dst: np.ndarray  # (E,) int64
    text_bytes: int  # UTF-8


def validate(source: Source, use_split_column: bool = True) -> CheckedGraph:
    """Read both tables once, holding ids, labels and edges but never the texts.

    Raises one DataError that lists every problem, each with its file, column, count, first offending values and remedy.
    """
    problems = list(source.problems)
    scan = _NodeScan(source.nodes, use_split_column)
    node_id = scan.run(problems)
    label, classes = scan.labels(problems)
    split = scan.splits(problems)
    src, dst = _scan_edges(source.edges, node_id, problems)
    where = source.nodes.where
    if not problems:
        if not (label >= 0).any():
            problems.append(f"{where}, column label: no node has a label; label some nodes (0, 1, … or a class name)")
        elif split is not None:
            problems.extend(split_problems(f"{where}, column split", label, split, classes, "set use_split_column=False"))
    if problems:
        raise DataError(source.name, problems)
    assert node_id is not None
    return CheckedGraph(node_id, label, classes, split, src, dst, scan.text_bytes)


def split_problems(where: str, label: np.ndarray, split: np.ndarray, classes: list[str], otherwise: str) -> list[str]:
    """The problem, if any, of classes without a training node."""
    absent = absent_classes(label, split, classes)
    if not absent:
        return []
    return [
        f"{where}: {len(absent)} of {len(classes)} classes have no labelled node in the training split "
        f"({show(absent)}); move nodes of these classes into it, unlabel or merge the classes, or {otherwise}"
    ]


def show(values: Iterable[Any], limit: int = 5) -> str:
    """The first values of a problem, shortened."""
    listed = list(values)
    texts = ["null" if v is None else repr(v) if len(repr(v)) <= 60 else repr(v)[:57] + "…'" for v in listed[:limit]]
    return ", ".join(texts) + (", …" if len(listed) > limit else "")


@dataclass
class _NodeScan:
    table: Table
    use_split: bool
    text_bytes: int = 0
    rows: int = 0
    ids: list[pa.Array] = field(default_factory=list)
    bad_texts: list[np.ndarray] = field(default_factory=list)  # row numbers
    codes: list[np.ndarray] = field(default_factory=list)  # labels: the integer, or the index into names
    names: dict[str, int] = field(default_factory=dict)
    label_kinds: set[str] = field(default_factory=set)
    label_names: set[tuple[str, str]] = field(default_factory=set)
    split_codes: list[np.ndarray] = field(default_factory=list)
    odd_splits: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)  # column → what is wrong with its type

    def run(self, problems: list[str]) -> pa.Array | None:
        """Read the table. Returns the ids, or None if they are too broken to look edges up in."""
        where = self.table.where
        try:
            present = self.table.columns()
            missing = [name for name in REQUIRED if name not in present]
            if missing:
                problems.append(
                    f"{where}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)} (it has {show(present, 12)}); "
                    "add or rename: node_id, text and label are required"
                )
            wanted = [*REQUIRED, "label_name", *(["split"] if self.use_split else [])]
            for batch in self.table.batches([name for name in wanted if name in present]):
                self._add(batch)
        except DataError as error:
            problems.extend(f"{error.where}: {problem}" for problem in error.problems)
            return None
        problems.extend(f"{where}, column {column}: {what}" for column, what in self.broken.items())
        if self.rows == 0 and not missing:
            problems.append(f"{where}: has no rows; a graph needs at least one node")
        node_id = None if {"node_id"} & ({*missing} | set(self.broken)) else self._finish_ids(problems)
        if self.bad_texts:
            bad = np.concatenate(self.bad_texts)
            which = f"node_id {show(node_id.take(bad[:6]).to_pylist())}" if node_id is not None else f"rows {show(bad[:6])}"
            problems.append(f"{where}, column text: {len(bad)} empty or null ({which}); write a text or drop the node")
        return node_id

    def _add(self, batch: pa.RecordBatch) -> None:
        column = {name: plain(batch.column(name)) for name in batch.schema.names}
        for name, add in (
            ("node_id", self._add_ids),
            ("text", self._add_texts),
            ("label", self._add_labels),
            ("split", self._add_splits),
        ):
            if name in column and name not in self.broken:
                try:
                    add(column[name])
                except (pa.ArrowException, TypeError) as error:
                    self.broken[name] = str(error).strip()
        if {"label", "label_name"} <= column.keys() and not self.broken.keys() & {"label", "label_name"}:
            if not is_text(column["label_name"].type) and not pa.types.is_null(column["label_name"].type):
                self.broken["label_name"] = f"is {column['label_name'].type}; make it strings"
            else:
                pairs = pa.table({"label": column["label"], "name": column["label_name"]})
                found = pairs.group_by(["label", "name"]).aggregate([]).to_pylist()
                self.label_names |= {(_whole(p["label"]), p["name"]) for p in found if p["name"] and p["label"] is not None}
        self.rows += batch.num_rows

    def _add_ids(self, column: pa.Array) -> None:
        if not is_text(column.type) and not pa.types.is_integer(column.type):
            raise TypeError(f"is {column.type}; make it integers or strings")
        if column.null_count:
            raise TypeError(f"has nulls (the first in row {self.rows + pc.index(pc.is_null(column), True).as_py()}); give every node an id")
        kind = pa.large_string() if is_text(column.type) else pa.int64()
        if self.ids and self.ids[0].type != kind:
            raise TypeError("is integers in one file and strings in another; make all of them alike")
        self.ids.append(column.cast(kind))

    def _add_texts(self, column: pa.Array) -> None:
        if not is_text(column.type) and not pa.types.is_null(column.type):
            raise TypeError(f"is {column.type}; make it strings")
        column = column.cast(pa.large_string())
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise TypeError(f"is not valid UTF-8 ({error}); decode and write the texts again") from error
        self.text_bytes += pc.sum(pc.binary_length(column)).as_py() or 0
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
        bad = np.flatnonzero(pc.fill_null(blank, True).to_numpy(zero_copy_only=False))
        if len(bad):
            self.bad_texts.append(bad + self.rows)

    def _add_labels(self, column: pa.Array) -> None:
        if is_text(column.type):
            encoded = column.dictionary_encode()
            of_value = [-1 if v == "" else self.names.setdefault(v, len(self.names)) for v in encoded.dictionary.to_pylist()]
            index = pc.fill_null(encoded.indices, len(of_value)).to_numpy(zero_copy_only=False)
            codes = np.array([*of_value, -1], dtype=np.int64)[index]
            self.label_kinds.add("strings")
        elif pa.types.is_integer(column.type) or pa.types.is_null(column.type) or pa.types.is_floating(column.type):
            if pa.types.is_floating(column.type):  # integers with holes, as pandas writes them
                column = pc.if_else(pc.is_nan(column), None, column)
                odd = column.filter(pc.not_equal(pc.floor(column), column))
                if len(odd):
                    raise TypeError(f"has fractions ({show(odd.to_pylist())}); make it integers or strings")
            codes = pc.fill_null(column.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
            if (codes < -1).any():
                raise TypeError(f"has labels below -1 ({show(np.unique(codes[codes < -1]).tolist())}); -1 means unlabelled")
            if not pa.types.is_null(column.type):
                self.label_kinds.add("integers")
        else:
            raise TypeError(f"is {column.type}; make it integers (-1 = unlabelled) or strings")
        if len(self.label_kinds) > 1:
            raise TypeError("is integers in one file and strings in another; make all of them alike")
        self.codes.append(codes)

    def _add_splits(self, column: pa.Array) -> None:
        if not is_text(column.type) and not pa.types.is_null(column.type):
            raise TypeError(f"is {column.type}; make it strings: train, val, test or empty")
        encoded = column.cast(pa.large_string()).dictionary_encode()
        values = [*encoded.dictionary.to_pylist(), None]
        index = pc.fill_null(encoded.indices, len(values) - 1).to_numpy(zero_copy_only=False)
        for value, count in zip(values, np.bincount(index, minlength=len(values)).tolist(), strict=True):
            if value not in SPLIT_VALUES:
                self.odd_splits[value] += count
        self.split_codes.append(np.array([SPLIT_VALUES.get(value, -1) for value in values], dtype=np.int8)[index])

    def _finish_ids(self, problems: list[str]) -> pa.Array:
        node_id = join(self.ids, pa.int64())
        if self.table.untyped and pc.all(pc.match_substring_regex(node_id, WHOLE_NUMBER)).as_py():
            try:
                node_id = node_id.cast(pa.int64())
            except pa.ArrowInvalid:  # beyond 64 bits: they stay strings
                pass
        if pc.count_distinct(node_id).as_py() < len(node_id):
            counts = pc.value_counts(node_id)
            repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
            problems.append(
                f"{self.table.where}, column node_id: {len(repeated)} duplicate ids ({show(repeated[:6].to_pylist())}); "
                "give every node one row"
            )
        return node_id

    def labels(self, problems: list[str]) -> tuple[np.ndarray, list[str]]:
        """(N,) int32 indices into the class names: integers in numeric order, strings sorted."""
        codes = np.concatenate(self.codes) if self.codes else np.zeros(0, np.int64)
        numeric = "strings" not in self.label_kinds
        if not numeric and self.table.untyped and all(pc.match_substring_regex(pa.array(list(self.names), pa.string()), WHOLE_NUMBER).to_pylist()):
            codes = np.array([int(name) for name in self.names] + [-1], dtype=np.int64)[codes]
            numeric = True
        if not numeric:
            names = list(self.names)
            order = sorted(range(len(names)), key=names.__getitem__)
            rank = np.full(len(names) + 1, -1, np.int32)
            rank[order] = np.arange(len(names))
            return rank[codes], [names[i] for i in order]
        values = np.unique(codes[codes >= 0])
        label = np.where(codes >= 0, np.searchsorted(values, codes), -1).astype(np.int32)
        return label, self._class_names([str(v) for v in values.tolist()], problems)

    def _class_names(self, values: list[str], problems: list[str]) -> list[str]:
        where = f"{self.table.where}, column label_name"
        of_value: dict[str, list[str]] = {}
        for value, name in sorted(self.label_names):
            of_value.setdefault(value, []).append(name)
        unsure = {value: names for value, names in of_value.items() if len(names) > 1 and value in values}
        if unsure:
            pairs = [f"{value}: {', '.join(names)}" for value, names in unsure.items()]
            problems.append(f"{where}: {len(unsure)} labels have several names ({show(pairs)}); give each label one name")
        classes = [of_value.get(value, [value])[0] for value in values]
        twice = [name for name, count in Counter(classes).items() if count > 1]
        if twice:
            problems.append(f"{where}: {len(twice)} names stand for several labels ({show(twice)}); merge or rename them")
        return classes

    def splits(self, problems: list[str]) -> np.ndarray | None:
        """(N,) int8, or None if no node has one."""
        if self.odd_splits:
            problems.append(
                f"{self.table.where}, column split: {self.odd_splits.total()} unknown values ({show(self.odd_splits)}); "
                "use train, val, test or an empty string"
            )
        split = np.concatenate(self.split_codes) if self.split_codes else np.zeros(0, np.int8)
        return split if (split >= 0).any() else None


def _scan_edges(table: Table | None, node_id: pa.Array | None, problems: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of every edge as node rows."""
    ends: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name in EDGE_COLUMNS}
    lost: dict[str, Counter[Any]] = {name: Counter() for name in EDGE_COLUMNS}
    if table is None:
        return ends["src"][0], ends["dst"][0]
    try:
        present = table.columns()
        missing = [name for name in EDGE_COLUMNS if name not in present]
        if missing:
            raise DataError(table.where, f"missing column{'s' * (len(missing) > 1)} {', '.join(missing)} (it has {show(present, 12)}); an edge table needs src and dst")
        for chunk in _gathered(table.batches(EDGE_COLUMNS)):
            if node_id is None:
                break
            for name in EDGE_COLUMNS:
                rows, unknown = _find(chunk.column(name), node_id, table.untyped, f"{table.where}, column {name}")
                lost[name].update(unknown)
                ends[name].append(rows)
    except DataError as error:
        problems.extend(f"{error.where}: {problem}" for problem in error.problems)
    for name, values in lost.items():
        if values:
            problems.append(
                f"{table.where}, column {name}: {values.total()} edges end at {len(values)} ids that no node has "
                f"({show(values)}); add these nodes or drop the edges"
            )
    return np.concatenate(ends["src"]), np.concatenate(ends["dst"])


def _find(column: pa.Array, node_id: pa.Array, untyped: bool, where: str) -> tuple[np.ndarray, list[Any]]:
    """Node rows of the ids in ``column``, and the ids that are none. Raises DataError for ids of another type."""
    column = plain(column)
    wanted = column
    if untyped and pa.types.is_integer(node_id.type):
        fits = pc.match_substring_regex(column, r"^(0|-?[1-9][0-9]{0,17})$")
        wanted = pc.if_else(fits, column, None).cast(pa.int64())
    elif is_text(column.type) != is_text(node_id.type) or not (is_text(column.type) or pa.types.is_integer(column.type)):
        raise DataError(where, f"is {column.type}, but node_id is {node_id.type}; make both integers or both strings")
    found = pc.index_in(wanted.cast(node_id.type), value_set=node_id)
    unknown = column.filter(pc.is_null(found)).to_pylist() if found.null_count else []
    return found.drop_null().to_numpy(zero_copy_only=False).astype(np.int64), unknown


def _gathered(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at least LOOKUP_ROWS (but for the last)."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(b) for b in waiting) >= LOOKUP_ROWS:
            yield pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def join(arrays: list[pa.Array], otherwise: pa.DataType) -> pa.Array:
    return pa.concat_arrays(arrays) if arrays else pa.array([], otherwise)


def plain(column: pa.Array) -> pa.Array:
    """The column without dictionary encoding (pandas categories)."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _whole(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value == value and value.is_integer() else str(value)
