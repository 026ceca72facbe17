"""The prepared text-attributed graph: what `prepare` publishes and what every shard loads.

Layout of a prepared TAG (all ids below are row numbers 0..N-1 of the node table unless said otherwise):

    META.json                     counts, classes, splits, tokenizer, partition, the hash of every file
    part-00000/nodes.parquet      node int64, node_id (as the user wrote it), tokens list<int32> (unpadded,
                                  special tokens included), label int32 (-1 = none), split int8
    part-00000/graph.safetensors  indptr, indices, degree, halo_node, halo_owner, halo_row, halo_depth
    part-00000/encodings.npy      (own nodes, d) float16: of a graph that brings encodings in place of texts,
                                  whose token lists are empty; META.json then has encodings.width
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import load_file as load_safetensors_file

from talk_dist.data import storage
from talk_dist.data.given import ENCODINGS, given_width, load_encodings
from talk_dist.errors import DataError

FORMAT = 1
SPLITS = ("train", "val", "test")  # a node's split is an index into this, or -1


@dataclass(frozen=True)
class TokenLists:
    """Token ids of many texts without padding: text i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray  # (n + 1,) int64
    values: np.ndarray  # (tokens,) int32

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def slice(self, start: int, stop: int) -> TokenLists:
        """Texts ``start`` to ``stop``, without a copy of their tokens."""
        offsets = self.offsets[start : stop + 1]
        return TokenLists(offsets - offsets[0], self.values[offsets[0] : offsets[-1]])

    def take(self, rows: np.ndarray) -> TokenLists:
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenLists(offsets, self.values[places])

    def padded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, both (len(rows), longest) int64: token ids with zeros after the end, 1 where a token is."""
        lengths = np.diff(self.offsets)[rows]
        mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = self.take(rows).values
        return ids, mask.astype(np.int64)

    def batches(self, most_tokens: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """For n texts: the row (n,) whose encoding each takes, and the batches of rows that are encoded, of
        ``most_tokens`` with what is padding.

        Exact duplicates are encoded once; batches hold texts of like length, so that little is padding.
        """
        first: dict[bytes, int] = {}
        source = np.array([first.setdefault(self[i].tobytes(), i) for i in range(len(self))], dtype=np.int64)
        unique = np.unique(source)
        lengths = np.diff(self.offsets)
        order = unique[np.argsort(-lengths[unique], kind="stable")]
        batches: list[np.ndarray] = []
        while len(order):
            size = max(1, most_tokens // max(1, int(lengths[order[0]])))
            batches.append(order[:size])
            order = order[size:]
        return source, batches

    @staticmethod
    def from_arrow(column: pa.ChunkedArray) -> TokenLists:
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # zero chunks
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
        offsets = array.offsets.to_numpy().astype(np.int64)
        values = array.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int32)
        return TokenLists(offsets - offsets[0], values)


@dataclass(frozen=True)
class Partition:
    """One partition: n own nodes, then h halo nodes (neighbours that other partitions own).

    Local column c is own node c if c < n, else halo node c - n. Halo nodes are ordered by
    (depth, owner, node); depth 1 are direct neighbours of own nodes. CSR rows exist for the own nodes and
    for halo nodes of depth < ``halo_hops``, which is what a kernel of ``halo_hops + 1`` hops needs.
    Edges are symmetric, unique, and include one self-loop a node; degrees are those of the whole graph.
    """

    index: int
    node: np.ndarray  # (n,) int64, ascending
    node_id: pa.Array  # (n,) as in the user's table
    tokens: TokenLists  # n lists
    label: np.ndarray  # (n,) int32, -1 = unlabelled
    split: np.ndarray  # (n,) int8, index into SPLITS or -1
    indptr: np.ndarray  # (rows + 1,) int64, rows >= n
    indices: np.ndarray  # (entries,) int32 where all local columns fit, else int64; ascending within a row
    degree: np.ndarray  # (n + h,) int64, self-loop counted
    halo_node: np.ndarray  # (h,) int64
    halo_owner: np.ndarray  # (h,) int32, partition that owns it
    halo_row: np.ndarray  # (h,) int64, its row in the owner
    halo_depth: np.ndarray  # (h,) int8
    encodings: np.ndarray | None = None  # (n, d) float16, read-only, a map of the file where that is local

    @property
    def num_own(self) -> int:
        return len(self.node)

    def stretches(self, entries: int) -> Iterator[slice]:
        """Own rows in stretches of at most so many entries of the CSR matrix, or of one row."""
        start = 0
        while start < self.num_own:
            stop = int(np.searchsorted(self.indptr, self.indptr[start] + entries, side="right")) - 1
            yield slice(start, start := min(max(stop, start + 1), self.num_own))

    def rows_of(self, split: str) -> np.ndarray:
        """Own rows (ascending) that are in ``split`` and labelled; ``all``: every own row, labelled or not."""
        if split == "all":
            return np.arange(self.num_own)
        return np.flatnonzero(self.labelled(split, slice(None)))

    def labelled(self, split: str, rows: np.ndarray | slice) -> np.ndarray:
        """Which of own ``rows`` are in ``split`` and labelled."""
        return (self.split[rows] == SPLITS.index(split)) & (self.label[rows] >= 0)


def content_hash(meta: dict[str, Any]) -> str:
    """sha256 hex of a META.json, which holds the hash of every file; its own ``hash`` left out."""
    content = {key: value for key, value in meta.items() if key != "hash"}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class PreparedTag:
    """A prepared TAG on storage: its META.json, and partitions loaded and verified on request."""

    def __init__(self, path: str):
        self.path = path
        if not storage.exists(storage.join(path, "META.json")):
            raise DataError(path, "is not a prepared TAG (no META.json); make one with `talk-dist prepare`")
        self.meta: dict[str, Any] = storage.read_json(storage.join(path, "META.json"))
        found = self.meta.get("format") if isinstance(self.meta, dict) else None
        if found != FORMAT:
            raise DataError(path, f"has format {found}, this version reads {FORMAT}; prepare it again")
        if self.meta.get("hash") != content_hash(self.meta):
            raise DataError(path, "META.json changed since it was prepared; prepare the graph again")

    @property
    def num_parts(self) -> int:
        return len(self.meta["parts"])

    @property
    def num_nodes(self) -> int:
        return int(self.meta["num_nodes"])

    @property
    def classes(self) -> list[str]:
        return list(self.meta["classes"])

    @property
    def encoding_width(self) -> int | None:
        """d, if the nodes bring encodings (d,) in place of texts."""
        given = self.meta.get("encodings")
        return int(given["width"]) if given else None

    @cached_property
    def train_class_counts(self) -> np.ndarray:
        """(C,) number of training nodes of each class."""
        return np.array(self.meta["class_counts"]["train"], dtype=np.int64)

    def check_split(self, split: str) -> None:
        """Raises DataError unless some labelled node is in ``split``."""
        if not self.meta["split_sizes"][split]:
            raise DataError(
                self.path, f"no labelled node is in the {split} split; give it some and prepare the graph again"
            )

    def check_tokenizer(self, name: str, fingerprint: str) -> None:
        """Raises DataError unless the texts were tokenised by the tokenizer that has ``fingerprint``."""
        made, width = self.meta["tokenizer"], self.encoding_width
        if made["fingerprint"] != fingerprint:
            if width is not None:
                remedy = f"set --encoder.name {made['name']} --synthetic.tokens 1"
                raise DataError(self.path, f"brings encodings {width} wide, no texts for encoder {name!r}; {remedy}")
            if given_width(name) is not None:
                remedy = f"set --encoder.name {made['name']}"
                raise DataError(self.path, f"has texts, no encodings as encoder {name!r} takes them; {remedy}")
            raise DataError(
                self.path,
                f"was tokenised for encoder {made['name']!r} (tokenizer {made['fingerprint'][:12]}), but encoder "
                f"{name!r} has tokenizer {fingerprint[:12]}; prepare it again with --encoder {name}",
            )

    def partition(self, index: int) -> Partition:
        """Load partition ``index``. Raises DataError if a file changed since `prepare`."""
        files = {name: self._verified(index, name) for name in self.meta["parts"][index]["files"]}
        nodes, edges = files["nodes.parquet"], files["graph.safetensors"]
        table = pq.ParquetFile(nodes if isinstance(nodes, str) else pa.BufferReader(nodes)).read()
        try:
            graph = load_safetensors_file(edges) if isinstance(edges, str) else load_safetensors(edges)
        except SafetensorError as error:
            raise DataError(self.path, f"part {index}: graph.safetensors cannot be read ({error})") from error
        column = {name: table.column(name) for name in table.column_names}
        return Partition(
            index=index,
            node=column["node"].to_numpy(),
            node_id=column["node_id"].combine_chunks(),
            tokens=TokenLists.from_arrow(column["tokens"]),
            label=column["label"].to_numpy(),
            split=column["split"].to_numpy(),
            **graph,
            encodings=load_encodings(files[ENCODINGS]) if ENCODINGS in files else None,
        )

    def _verified(self, index: int, name: str) -> str | bytes:
        """Where a file of a partition lies on this machine, or its content from elsewhere: as `prepare` made it."""
        relative = f"part-{index:05d}/{name}"
        uri = storage.join(self.path, relative)
        found = storage.local_path(uri) or storage.read_bytes(uri)
        digest = storage.file_hash(found) if isinstance(found, str) else hashlib.sha256(found).hexdigest()
        if digest != self.meta["parts"][index]["files"][name]["sha256"]:
            raise DataError(self.path, f"{relative} changed since it was prepared; prepare the graph again")
        return found
