"""A trained student on a shard's nodes, stage by stage, in whatever memory there is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from talk_dist.data.tag import Partition
from talk_dist.models.gnn import local_graph
from talk_dist.runtime.boundary import StudentState
from talk_dist.runtime.fields import Fields

STAGE_BYTES = 1 << 30  # of what a student makes of nodes at once
MADE = 4  # arrays of its width, at most, that a stage makes


class StudentPass:
    """Works on the field "X", which begins as "H"; the pool exchanges its direct halo before every stage."""

    def __init__(self, state: StudentState, part: Partition, fields: Fields):
        self._student, self._part, self._fields = state.build(), part, fields
        self._graph: Tensor | None = None
        fields.share("X", "H")

    def stage(self, index: int) -> None:
        """X = stage(X) on own rows: of all of them at once or, where that takes too much, of so many that they and all
        their neighbours fit."""
        student, part, fields = self._student, self._part, self._fields
        node_bytes = MADE * 4 * max(student.in_dim, student.config.hidden)
        whole = fields.rows * node_bytes <= STAGE_BYTES
        stretches = [slice(0, part.num_own)] if whole else part.stretches(max(1, STAGE_BYTES // node_bytes))
        for rows in stretches:
            nodes, graph = self._everything() if whole else self._surroundings(rows)
            root = torch.from_numpy(fields["root"][nodes]).float() if index and student.has_root else None
            with torch.no_grad():
                x, root = student.stage(index, torch.from_numpy(fields["X"][nodes]).float(), graph, root)
            made = {"next": x} if index or root is None else {"next": x, "root": root}
            for name, value in made.items():
                if not rows.start:
                    fields.blank(name, value.shape[1])
                fields.put(name, rows, slice(None), value[: rows.stop - rows.start].numpy())
        fields.share("X", "next")

    def _everything(self) -> tuple[np.ndarray, Tensor]:
        part = self._part
        if self._graph is None:
            indptr = part.indptr[: part.num_own + 1]
            self._graph = local_graph(self._student.config.kind, indptr, part.indices[: indptr[-1]], part.degree)
        return np.arange(self._fields.rows), self._graph

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
        graph = local_graph(self._student.config.kind, indptr - indptr[0], place[columns], part.degree[nodes])
        return nodes, graph
