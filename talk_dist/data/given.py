"""Encodings that a graph brings in place of texts: someone else's embeddings, or made ones.

The node table has them in a column ``encoding``, a list of floats. They are checked as they pass, and kept as float16
in one file a partition. The encoder of such a graph is called ``given:<width>``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from talk_dist.errors import ConfigError, DataError

COLUMN, ENCODINGS = "encoding", "encodings.npy"
PREFIX = "given:"
LARGEST = float(np.finfo(np.float16).max)
SHOWN = 6


def given_name(width: int) -> str:
    """The encoder of graphs whose encodings are so wide."""
    return f"{PREFIX}{width}"


def given_width(name: str) -> int | None:
    """The width in an encoder's name ``given:<width>``; None of any other name.

    Raises ConfigError if there is no width in it.
    """
    if not name.startswith(PREFIX):
        return None
    digits = name.removeprefix(PREFIX)
    if not digits.isdecimal() or not int(digits):
        raise ConfigError(f"encoder {name!r}: say how wide the given encodings are, such as given:128")
    return int(digits)


@dataclass
class EncodingScan:
    """The pass over a column of encodings: what is wrong is counted, with the first rows of each kind."""

    width: int | None = None  # of the first one
    odd: dict[str, int] = field(default_factory=dict)  # what is wrong → rows
    first: dict[str, list[int]] = field(default_factory=dict)  # what is wrong → row numbers

    def add(self, column: pa.Array, begin: int) -> None:
        """The rows from ``begin`` on. Raises TypeError if they are no lists of floats."""
        kind = column.type
        if not _is_list(kind) or not pa.types.is_floating(kind.value_type):
            raise TypeError(f"is {kind}; make it lists of floats, all of one length, in Parquet (CSV has no lists)")
        lengths = pc.list_value_length(column).cast(pa.int64()).fill_null(-1).to_numpy()
        known = lengths[lengths >= 0]
        if self.width is None and len(known):
            self.width = int(known[0])
            if not self.width:
                raise TypeError("has lists without any number; give every node an encoding")
        whole = lengths == self.width
        self._tell("null", begin + np.flatnonzero(lengths < 0))
        self._tell("width", begin + np.flatnonzero((lengths >= 0) & ~whole))
        if not whole.any():
            return
        values = _matrix(column if whole.all() else column.filter(pa.array(whole)), int(self.width or 0))
        wide = values.astype(np.float32) if values.dtype == np.float16 else values  # halves are slow to compare
        peak, rows = np.abs(wide).max(1), begin + np.flatnonzero(whole)
        finite = np.isfinite(peak)  # a NaN is the largest of its row
        self._tell("finite", rows[~finite])
        self._tell("large", rows[finite & (peak > LARGEST)])

    def _tell(self, what: str, rows: np.ndarray) -> None:
        if len(rows):
            self.odd[what] = self.odd.get(what, 0) + len(rows)
            first = self.first.setdefault(what, [])
            first += rows[: SHOWN - len(first)].tolist()

    def problems(self, where: str, named: Callable[[Sequence[int]], str]) -> list[str]:
        """In words; ``named(first rows)`` says which nodes these are."""
        words = {
            "null": "are null; give every node one or drop the node",
            "width": f"are not {self.width} wide, as the first is; give all the same width",
            "finite": "have values that are null, NaN or infinite; replace them",
            "large": f"have values beyond ±{LARGEST:.0f}, the largest float16; scale all encodings down",
        }
        told = []
        for what, count in self.odd.items():
            says, remedy = words[what].split("; ")
            told.append(f"{where}: {count} encodings {says} ({named(self.first[what])}); {remedy}")
        return told


def halves(column: pa.Array, width: int, where: str) -> np.ndarray:
    """Encodings (n, width) float16 of a column that was found good. Raises DataError if it is so no more."""
    if not _is_list(column.type) or pc.any(pc.not_equal(pc.list_value_length(column), width).fill_null(True)).as_py():
        raise DataError(where, "changed while it was being prepared; run again when nothing writes to it")
    return _matrix(column, width).astype(np.float16)


class EncodingFile:
    """encodings.npy of one part, written row by row."""

    def __init__(self, path: str | os.PathLike[str], rows: int, width: int):
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, "<f2").data)

    def close(self) -> None:
        self._file.close()


def load_encodings(source: str | bytes) -> np.ndarray:
    """(n, d) float16, read-only: a map of the file at a path, or a view of its content."""
    if isinstance(source, str):
        mapped: np.ndarray = np.load(source, mmap_mode="r", allow_pickle=False)
        return mapped
    stream = io.BytesIO(source)
    np.lib.format.read_magic(stream)
    shape, _, kind = np.lib.format.read_array_header_1_0(stream)
    return np.frombuffer(source, kind, offset=stream.tell()).reshape(shape)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _matrix(column: pa.Array, width: int) -> np.ndarray:
    """(n, width) of lists of one length, none null; a null inside is NaN."""
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)
