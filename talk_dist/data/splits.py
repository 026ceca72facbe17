"""Which nodes are for training, validation and test: by hash of the node's own id, never by its place in the table."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, islice
from typing import Any

import numpy as np
import pyarrow as pa

from talk_dist.data.tag import SPLITS
from talk_dist.errors import ConfigError

DEFAULT_RATIOS = (0.6, 0.2, 0.2)
SPLIT_VALUES = {None: -1, "": -1, "train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}


def hash_ids(node_ids: pa.Array | pa.ChunkedArray | np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64, a hash of each id and ``seed`` alone. Integers never collide (splitmix64 is a bijection)."""
    if isinstance(node_ids, pa.Array | pa.ChunkedArray) and pa.types.is_integer(node_ids.type):
        node_ids = node_ids.to_numpy(zero_copy_only=False) if isinstance(node_ids, pa.Array) else node_ids.to_numpy()
    if isinstance(node_ids, np.ndarray) and node_ids.dtype.kind in "iu":
        key = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
        return _splitmix64(node_ids.astype(np.int64).view(np.uint64) ^ key)
    key_bytes = (seed % 2**64).to_bytes(8, "little")
    texts = node_ids.tolist() if isinstance(node_ids, np.ndarray) else node_ids.to_pylist()
    digests = b"".join(hashlib.blake2b(str(text).encode(), digest_size=8, key=key_bytes).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, elementwise modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_ratios(ratios: Sequence[float]) -> None:
    """Raises ConfigError unless ``ratios`` are three shares (train, val, test) of at most 1 together."""
    good = len(ratios) == 3 and all(math.isfinite(r) and r >= 0 for r in ratios)
    if not good or ratios[0] == 0 or sum(ratios) > 1 + 1e-9:
        raise ConfigError(
            f"split ratios are {list(ratios)}; they must be three shares (train, val, test), none negative, "
            "the first positive, adding to at most 1, such as [0.6, 0.2, 0.2]"
        )


def random_split(
    node_ids: pa.Array | np.ndarray, label: np.ndarray, ratios: Sequence[float] = DEFAULT_RATIOS, seed: int = 0
) -> np.ndarray:
    """(n,) int8 index into SPLITS for labelled nodes (label >= 0), -1 for the others; shares exact to one node."""
    check_ratios(ratios)
    labelled = np.flatnonzero(label >= 0)
    order = labelled[np.argsort(hash_ids(node_ids, seed)[labelled], kind="stable")]
    ends = [math.floor(len(order) * share + 0.5) for share in np.cumsum(ratios)]
    split = np.full(len(label), -1, np.int8)
    for index, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        split[order[begin:end]] = index
    return split


def class_counts(label: np.ndarray, split: np.ndarray, num_classes: int) -> dict[str, list[int]]:
    """Labelled nodes of each class, for ``"all"`` and for each of SPLITS."""
    counts = {"all": np.bincount(label[label >= 0], minlength=num_classes).tolist()}
    for index, name in enumerate(SPLITS):
        counts[name] = np.bincount(label[(label >= 0) & (split == index)], minlength=num_classes).tolist()
    return counts


def absent_problems(where: str, label: np.ndarray, split: np.ndarray, classes: Sequence[str], remedy: str) -> list[str]:
    """The problem, if any, of classes that no training node has: nothing could learn them."""
    counts = class_counts(label, split, len(classes))["train"]
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if not absent:
        return []
    return [
        f"{where}: {len(absent)} of {len(classes)} classes have no labelled node in the training split "
        f"({show(absent)}); move nodes of these classes into it, unlabel or merge the classes, or {remedy}"
    ]


def overlap_problems(where: str, members: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The problems, if any, of node rows that are in two splits."""
    problems = []
    for a, b in combinations(members, 2):
        both = np.intersect1d(members[a], members[b])
        if len(both):
            problems.append(
                f"{where}: {len(both)} nodes are in both {a} and {b} ({show(both.tolist())}); give each one split"
            )
    return tuple(problems)


def split_column(num_nodes: int, members: dict[str, np.ndarray]) -> pa.Array:
    """The split column (strings, dictionary encoded) of nodes that are listed by split."""
    code = np.zeros(num_nodes, np.int8)
    for index, rows in enumerate(members.values(), 1):
        code[rows] = index
    return pa.DictionaryArray.from_arrays(code, pa.array(["", *members]))


def read_split(column: pa.Array, unknown: Counter[str]) -> np.ndarray:
    """(n,) int8 of a split column; values that are no split are counted in ``unknown``. Raises TypeError."""
    if not any(check(column.type) for check in (pa.types.is_null, pa.types.is_string, pa.types.is_large_string)):
        raise TypeError(f"is {column.type}; make it strings: train, val, test or empty")
    encoded = column.cast(pa.large_string()).dictionary_encode()
    values = [*encoded.dictionary.to_pylist(), None]
    index = encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
    for value, count in zip(values, np.bincount(index, minlength=len(values)).tolist(), strict=True):
        if value not in SPLIT_VALUES:
            unknown[value] += count
    return np.array([SPLIT_VALUES.get(value, -1) for value in values], dtype=np.int8)[index]


def show(values: Iterable[Any], limit: int = 5) -> str:
    """The first values of a problem, shortened, for its message."""
    listed = list(islice(values, limit + 1))
    texts = ["null" if v is None else repr(v) if len(repr(v)) <= 60 else repr(v)[:57] + "…'" for v in listed[:limit]]
    return ", ".join(texts) + (", …" if len(listed) > limit else "")
