"""From tables to a prepared TAG: check, split, partition, tokenise once, publish (layout: see tag.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from talk_dist.data import given, storage
from talk_dist.data.columns import plain
from talk_dist.data.partition import METHODS, edge_cut, partition_nodes, split_graph, symmetrise
from talk_dist.data.splits import DEFAULT_RATIOS, absent_problems, check_ratios, class_counts, random_split
from talk_dist.data.tables import Source
from talk_dist.data.tag import FORMAT, SPLITS, PreparedTag, TokenLists, content_hash
from talk_dist.data.tokenizer import Tokenizer, load_tokenizer
from talk_dist.data.validate import CheckedGraph, brings_encodings, validate
from talk_dist.errors import ConfigError, DataError

ENCODER = "minilm"
ENCODE_ROWS = 2048  # texts tokenised at once
BUFFERED_ROWS = 1 << 18  # tokenised nodes that wait for their row group, all parts together


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    *,
    encoder: str = ENCODER,
    max_tokens: int = 128,
    parts: int = 1,
    method: str = "auto",
    halo_hops: int = 1,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    split_seed: int = 0,
    use_split_column: bool = True,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedTag:
    """Check the tables of ``source``, tokenise its texts and publish a prepared TAG at ``out``.

    The texts are read twice and never held: memory is bounded by ids, labels and edges. A node table with encodings in
    place of texts is prepared for the encoder ``given:<width>``, whatever the default. ``ratios`` and ``split_seed``
    make a random split of the labelled nodes where the tables bring none. ``progress(done, total)`` counts nodes.
    The same tables and settings give the same bytes. Raises ConfigError for a setting and DataError for tables that
    cannot work; whatever is raised, what was at ``out`` before is untouched.
    """
    _check_settings(parts, method, halo_hops)
    check_ratios(ratios)
    if _is_given(source) or given.given_width(encoder) is not None:
        graph = validate(source, use_split_column)
        if graph.width is None:
            load_tokenizer(encoder).encode([], max_tokens)  # raises: it reads no texts
        encoder, max_tokens = _given_encoder(encoder, graph.width or 0), 1
        tokenizer = load_tokenizer(encoder)
    else:
        tokenizer = load_tokenizer(encoder)
        tokenizer.encode([], max_tokens)  # raises now if max_tokens does not fit
        graph = validate(source, use_split_column)
    split = graph.split
    if split is None:
        split = random_split(graph.node_id, graph.label, ratios, split_seed)
        problems = absent_problems(
            f"{source.nodes.where}, column label", graph.label, split, graph.classes, "try another split_seed"
        )
        if problems:
            raise DataError(source.name, problems)
    num_nodes = len(graph.label)
    indptr, indices = symmetrise(graph.src, graph.dst, num_nodes)
    none = np.zeros(0, np.int64)
    graph = replace(graph, src=none, dst=none)  # they weigh as much as what was made of them
    assignment, used, why = partition_nodes(indptr, indices, parts, method)
    counts = class_counts(graph.label, split, len(graph.classes))
    meta: dict[str, Any] = {
        "format": FORMAT,
        "name": name or source.name,
        "num_nodes": num_nodes,
        "num_edges": (len(indices) - num_nodes) // 2,
        "num_labelled": sum(counts["all"]),
        "classes": graph.classes,
        "class_counts": counts,
        "split_sizes": {part: sum(counts[part]) for part in SPLITS},
        "split": {"how": "column"}
        if graph.split is not None
        else {"how": "random", "seed": split_seed, "ratios": [float(r) for r in ratios]},
    }
    if graph.width is not None:
        meta["encodings"] = {"width": graph.width}
    about = {"edge_cut": edge_cut(indptr, indices, assignment), "isolated": int((np.diff(indptr) == 1).sum())}
    with storage.publish_folder(out, marker="META.json") as folder:
        records: list[dict[str, Any]] = []
        for index, part in enumerate(split_graph(indptr, indices, assignment, parts, halo_hops)):
            path = folder / f"part-{index:05d}"
            path.mkdir()
            save_file(part.arrays(), path / "graph.safetensors")
            train = int(((split[part.node] == 0) & (graph.label[part.node] >= 0)).sum())
            size = {"nodes": len(part.node), "halo": len(part.halo_node), "entries": len(part.indices)}
            records.append({**size, "tokens": 0, "train": train, "files": {}})
        del indptr, indices, part
        texts = _write_nodes(folder, source, graph, split, assignment, tokenizer, max_tokens, records, progress)
        halo = sum(record["halo"] for record in records)
        meta["tokenizer"] = {
            "name": encoder,
            "fingerprint": tokenizer.fingerprint,
            "max_tokens": max_tokens,
            "truncated": texts.pop("truncated"),
        }
        meta["text"] = texts
        meta["partition"] = {
            "method": used,
            "why": why,
            "parts": parts,
            "edge_cut": about["edge_cut"],
            "halo_ratio": halo / num_nodes,
            "halo_hops": halo_hops,
            "isolated": about["isolated"],
        }
        files = ("nodes.parquet", "graph.safetensors", given.ENCODINGS)[: 2 if graph.width is None else 3]
        for index, record in enumerate(records):
            for file in files:
                record["files"][file] = _describe(folder / f"part-{index:05d}" / file)
        meta["parts"] = records
        meta["hash"] = content_hash(meta)
        (folder / "META.json").write_bytes(storage.to_json(meta))
    return PreparedTag(os.fspath(out))


def _is_given(source: Source) -> bool:
    try:
        return brings_encodings(source.nodes.columns())
    except DataError:  # `validate` tells, with all else
        return False


def _given_encoder(encoder: str, width: int) -> str:
    name = given.given_name(width)
    if encoder not in (ENCODER, name):
        raise ConfigError(
            f"encoder is {encoder!r}, but the node table brings encodings {width} wide in place of texts; leave "
            f"encoder out, or set {name}"
        )
    return name


def _check_settings(parts: int, method: str, halo_hops: int) -> None:
    if parts < 1:
        raise ConfigError(f"parts is {parts}; use 1 or more")
    if not 1 <= halo_hops <= 127:
        raise ConfigError(f"halo_hops is {halo_hops}; use 1 or more (a kernel of k hops needs k - 1)")
    if method not in METHODS:
        raise ConfigError(f"partition method is {method!r}; use one of {', '.join(METHODS)}")


def _write_nodes(
    folder: Path,
    source: Source,
    graph: CheckedGraph,
    split: np.ndarray,
    assignment: np.ndarray,
    tokenizer: Tokenizer,
    max_tokens: int,
    records: list[dict[str, Any]],
    progress: Callable[[int, int], None] | None,
) -> dict[str, int]:
    """Tokenise every text and write each node into its part, in the order of the table. Returns the text counts.

    Encodings in place of texts are written as float16, and take so many bytes.
    """
    total, done = len(graph.label), 0
    counts = {"bytes": graph.text_bytes, "train_bytes": 0, "tokens": 0, "truncated": 0}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                _PartWriter(folder / f"part-{i:05d}", graph, split, BUFFERED_ROWS // len(records), record["nodes"])
            )
            for i, record in enumerate(records)
        ]
        for batch in source.node_batches(["text" if graph.width is None else given.COLUMN]):
            for begin in range(0, batch.num_rows, ENCODE_ROWS):
                texts = plain(batch.column(0).slice(begin, ENCODE_ROWS))
                rows = np.arange(done, done + len(texts))
                if done + len(texts) > total:
                    break
                training = (split[rows] == 0) & (graph.label[rows] >= 0)
                encodings = None
                if graph.width is None:
                    lists, cut = tokenizer.encode_and_count(texts.to_pylist(), max_tokens)
                    counts["train_bytes"] += pc.sum(pc.binary_length(texts.filter(pa.array(training)))).as_py() or 0
                    counts["tokens"] += len(lists.values)
                    counts["truncated"] += cut
                else:
                    lists = TokenLists(np.zeros(len(rows) + 1, np.int64), np.zeros(0, np.int32))
                    encodings = given.halves(texts, graph.width, source.nodes.where)
                    counts["train_bytes"] += int(training.sum()) * 2 * graph.width
                owners = assignment[rows]
                for part in np.unique(owners).tolist():
                    mine = np.flatnonzero(owners == part)
                    writers[part].add(rows[mine], lists.take(mine), None if encodings is None else encodings[mine])
                done += len(texts)
                if progress:
                    progress(done, total)
    if done != total:
        raise DataError(source.nodes.where, "changed while it was being prepared; run again when nothing writes to it")
    for record, writer in zip(records, writers, strict=True):
        record["tokens"] = writer.tokens
    return counts


class _PartWriter:
    """nodes.parquet of one part, in row groups whose size does not depend on how the rows arrive, and encodings.npy."""

    def __init__(self, folder: Path, graph: CheckedGraph, split: np.ndarray, group: int, nodes: int):
        self.graph, self.split = graph, split
        self.group = min(max(group, 256), 8192)
        self.tokens = 0
        self.waiting: list[pa.Table] = []
        id_type = pa.int64() if pa.types.is_integer(graph.node_id.type) else pa.string()
        self.schema = pa.schema(
            {
                "node": pa.int64(),
                "node_id": id_type,
                "tokens": pa.list_(pa.int32()),
                "label": pa.int32(),
                "split": pa.int8(),
            }
        )
        self.writer = pq.ParquetWriter(folder / "nodes.parquet", self.schema, compression="zstd")
        width = graph.width
        self.encodings = None if width is None else given.EncodingFile(folder / given.ENCODINGS, nodes, width)

    def add(self, rows: np.ndarray, lists: TokenLists, encodings: np.ndarray | None) -> None:
        if self.encodings is not None and encodings is not None:
            self.encodings.add(encodings)
        tokens = pa.ListArray.from_arrays(pa.array(lists.offsets, pa.int32()), pa.array(lists.values, pa.int32()))
        node_id = self.graph.node_id.take(pa.array(rows)).cast(self.schema.field("node_id").type)
        columns = [pa.array(rows), node_id, tokens, pa.array(self.graph.label[rows]), pa.array(self.split[rows])]
        self.waiting.append(pa.table(columns, schema=self.schema))
        self.tokens += len(lists.values)
        if sum(len(table) for table in self.waiting) >= self.group:
            self._flush(keep=True)

    def _flush(self, keep: bool) -> None:
        table = pa.concat_tables(self.waiting, promote_options="none") if self.waiting else self.schema.empty_table()
        whole = len(table) // self.group * self.group if keep else len(table)
        if whole:
            self.writer.write_table(table.slice(0, whole).combine_chunks(), row_group_size=self.group)
        self.waiting = [table.slice(whole).combine_chunks()] if whole < len(table) else []

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush(keep=False)
        self.writer.close()
        if self.encodings is not None:
            self.encodings.close()


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": storage.file_hash(path)}
