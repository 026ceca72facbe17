"""What a shard knows of every node, one array a field: in memory, or memory-mapped on disk in half precision."""

from __future__ import annotations

import os
import shutil
import tempfile

import numpy as np
import torch
from torch import Tensor

from talk_dist.errors import ConfigError

READ_ROWS = 1 << 16  # rows that are copied at once
FLOAT16_MAX = float(np.finfo(np.float16).max)


class Fields:
    """Arrays (rows, width) by name. Read them as arrays; write with `blank` and `put`, which says what does not fit.

    With ``disk`` they are float16 files in the folder ``scratch`` (empty: the system's) that have no name, so that they
    are gone with the process however it ends: the system caches what it has room for, and drops that when memory is
    wanted elsewhere.
    """

    def __init__(self, rows: int, disk: bool = False, scratch: str = ""):
        self.rows = rows
        self._disk, self._scratch = disk, scratch
        self._arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def read(
        self, name: str, rows: slice | np.ndarray, columns: slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Of this ``dtype``, and not to be written to: where nothing is to be converted it is the field itself."""
        kind = np.float64 if dtype is torch.float64 else np.float32
        return torch.from_numpy(np.ascontiguousarray(self._arrays[name][rows, columns], dtype=kind))

    def blank(self, name: str, width: int, dtype: np.dtype | type = np.float32) -> None:
        """A field of zeros in the place of what had this name; on disk it is float16 whatever ``dtype``. Raises
        ConfigError if ``scratch`` is not there or has no room: written to without it, a mapped file ends the process.
        """
        self._arrays.pop(name, None)
        if not self._disk:
            self._arrays[name] = np.zeros((self.rows, width), dtype)
            return
        size = max(1, 2 * self.rows * width)
        try:
            with tempfile.TemporaryFile(dir=self._scratch or None) as file:  # whoever maps it keeps it
                os.posix_fallocate(file.fileno(), 0, size)
                self._arrays[name] = np.memmap(file, np.float16, "r+", shape=(self.rows, width))
        except OSError as error:
            where = f"runtime.scratch = {self._scratch!r}"
            raise ConfigError(f"{where}: no place for the {size:,} bytes of a field ({error.strerror})") from error

    def put(self, name: str, rows: slice | np.ndarray, columns: slice, values: np.ndarray) -> None:
        """In memory, what is all of a field becomes it. Raises ConfigError for what half precision cannot hold."""
        if self._disk and len(values) and float(np.abs(values).max()) > FLOAT16_MAX:
            raise ConfigError(
                f'kernel.fields = "disk": field {name} has the value {np.abs(values).max():.3g}, beyond half precision '
                f'({FLOAT16_MAX:.0f}); set kernel.fields to "memory"'
            )
        if not self._disk and isinstance(rows, slice) and values.shape == self._arrays[name].shape:
            self._arrays[name] = values
        else:
            self._arrays[name][rows, columns] = values

    def drop(self, *names: str) -> None:
        """Forget fields, if they are there."""
        for name in names:
            self._arrays.pop(name, None)

    def share(self, name: str, source: str) -> None:
        """``name`` is ``source``, until one of them is written anew."""
        self._arrays[name] = self._arrays[source]


def available_disk(scratch: str) -> int:
    """Bytes that are free in the folder ``scratch`` (empty: the system's for temporary files). Raises ConfigError if
    there is none."""
    try:
        return shutil.disk_usage(scratch or tempfile.gettempdir()).free
    except OSError as error:
        raise ConfigError(f"runtime.scratch = {scratch!r}: {error.strerror}") from error
