"""One hop over a field of a shard, with some of its columns and of its edges in memory at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from talk_dist.data.tag import Partition
from talk_dist.kernel.sntk import propagation, to_torch
from talk_dist.runtime.fields import READ_ROWS, Fields

PROPAGATED_BYTES = 1 << 30  # of the columns that are in memory at once
PROPAGATED_ENTRIES = 1 << 23  # edges whose weights are in memory at once


def propagate(
    part: Partition, fields: Fields, kind: str, source: str, target: str, dtype: torch.dtype, device: torch.device
) -> None:
    """target = P source on own rows, P as `propagation` has it; the source's direct halo must be there."""
    field = fields[source]
    width = max(1, PROPAGATED_BYTES // (len(field) * dtype.itemsize))
    fields.blank(target, field.shape[1], np.float64 if dtype is torch.float64 else np.float32)
    for column in range(0, field.shape[1], width):
        columns = slice(column, column + width)
        x = fields.read(source, slice(None), columns, dtype).to(device)
        for rows in part.stretches(PROPAGATED_ENTRIES):
            indptr = part.indptr[rows.start : rows.stop + 1]
            indices = part.indices[indptr[0] : indptr[-1]]
            weights = to_torch(propagation(indptr - indptr[0], indices, part.degree, kind), dtype, device)
            fields.put(target, rows, columns, (weights @ x).cpu().numpy())


def row_by_row(fields: Fields, target: str, rows: int, make: Callable[[slice], Tensor]) -> None:
    """target = ``make`` of the first ``rows`` rows, so many of them at once."""
    for start in range(0, rows, READ_ROWS):
        some = slice(start, min(start + READ_ROWS, rows))
        made = make(some).numpy()
        if not start:
            fields.blank(target, made.shape[1])
        fields.put(target, some, slice(None), made)
