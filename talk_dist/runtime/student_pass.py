"""A trained student on a shard's nodes, stage by stage, in whatever memory there is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from talk_dist.data.tag import Partition
from talk_dist.models.gnn import local_graph, propagation_kind
from talk_dist.runtime.boundary import StudentState
from talk_dist.runtime.fields import Fields
from talk_dist.runtime.propagate import propagate, row_by_row

STAGE_BYTES = 1 << 30  # of what attention makes of nodes at once
MADE = 6  # arrays of its width, at most, that it makes


class StudentPass:
    """Works on the field "X", which begins as "H"; the pool exchanges its direct halo before every stage."""

    def __init__(self, state: StudentState, part: Partition, fields: Fields):
        self._student, self._part, self._fields = state.build(), part, fields
        self._returns = state.config.kind == "appnp"  # to what the first stage made of the nodes
        fields.share("X", "H")

    @torch.no_grad()
    def stage(self, index: int) -> None:
        """X = stage(X) on own rows."""
        if self._student.linear:
            self._linear(index)
        else:
            self._attention(index)
        self._fields.share("X", "next")
        self._fields.drop("next", "before", "gathered", *(() if self._returns else ("root",)))

    def _linear(self, index: int) -> None:
        student, fields, own = self._student, self._fields, self._part.num_own
        probe = fields.read("X", slice(0, 1))
        if student.before(index, probe) is probe:
            fields.share("before", "X")
        else:
            row_by_row(fields, "before", fields.rows, lambda rows: student.before(index, fields.read("X", rows)))
        if not (index and self._returns):
            fields.share("root", "before")
        kind = propagation_kind(student.config)
        propagate(self._part, fields, kind, "before", "gathered", torch.float32, torch.device("cpu"))

        def after(rows: slice) -> Tensor:
            return student.after(index, *(fields.read(name, rows) for name in ("gathered", "before", "root")))

        row_by_row(fields, "next", own, after)

    def _attention(self, index: int) -> None:
        """Of so many own rows at once that they and all their neighbours fit."""
        student, part, fields = self._student, self._part, self._fields
        node_bytes = MADE * 4 * max(student.in_dim, student.config.hidden)
        for rows in part.stretches(STAGE_BYTES // node_bytes):
            nodes, graph = self._surroundings(rows)
            x, _ = student.stage(index, fields.read("X", nodes), graph, None)
            if not rows.start:
                fields.blank("next", x.shape[1])
            fields.put("next", rows, slice(None), x[: rows.stop - rows.start].numpy())

    def _surroundings(self, rows: slice) -> tuple[np.ndarray, Tensor]:
        """A stretch of own rows as a shard of its own: its nodes, then those around it; and its graph."""
        part = self._part
        indptr = part.indptr[rows.start : rows.stop + 1]
        near, columns = np.unique(part.indices[indptr[0] : indptr[-1]], return_inverse=True)
        inside = (near >= rows.start) & (near < rows.stop)
        place = np.empty(len(near), np.int64)
        place[inside] = near[inside] - rows.start  # every node sees itself: all of the stretch is among them
        place[~inside] = len(indptr) - 1 + np.arange(int((~inside).sum()))
        nodes = np.concatenate([np.arange(rows.start, rows.stop), near[~inside]])
        graph = local_graph(self._student.config, indptr - indptr[0], place[columns], part.degree[nodes])
        return nodes, graph
