"""Which real rows a kernel block has, and how they are cut to fit memory and the cores' caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from talk_dist.config import KernelConfig
from talk_dist.data.splits import hash_ids
from talk_dist.data.tag import Partition
from talk_dist.kernel.sntk import Hop, between_directions
from talk_dist.runtime.boundary import Share

FOLD_SEED = -1  # no split's
LIVE_BUFFERS = 12  # arrays of the size (rows, M) that a kernel block with gradient holds at its peak
TILE_ELEMENTS = 1 << 18  # of a block whose rows are independent: it stays in the cores' caches
TILE_ROWS = 256  # at least, or its products are slow
TOGETHER = 512  # synthetic nodes inverted side by side: their histories are what it costs
HISTORY = 10  # pairs of steps and gradient changes that stand for the curvature there


@dataclass(frozen=True)
class Chunk:
    """Wanted rows, the rows of Z in their receptive field, and the sparse matrices of hops 2..K between directions."""

    rows: np.ndarray
    support: np.ndarray
    hops: list[Hop]


class Chunks:
    """Of one partition and one set of norms; what was planned once is kept."""

    def __init__(
        self,
        part: Partition,
        kernel: KernelConfig,
        dtype: torch.dtype,
        device: torch.device,
        norms: Sequence[Tensor],
        propagation: Callable[[], sp.csr_matrix],
    ):
        """``norms`` of each round, by local node; ``propagation()`` is asked for only where rows need neighbours."""
        self._part, self._kernel, self._dtype, self._device = part, kernel, dtype, device
        self._norms, self._propagation = norms, propagation
        self._lots: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of a split: rows in the order of their lots
        self._kept: dict[tuple[object, ...], list[Chunk]] = {}

    def of(self, split: str, num_synthetic: int, block: Share = (0, 1), fold: Share = (0, 1)) -> list[Chunk]:
        """The rows of ``split``, of one of so many blocks and one of so many folds of that, in chunks whose block with
        ``num_synthetic`` columns fits kernel.chunk_mib and, where rows are independent, the caches."""
        key = (split, num_synthetic, block, fold)
        if key not in self._kept:
            limit = max(1, (self._kernel.chunk_mib << 20) // (num_synthetic * self._dtype.itemsize * LIVE_BUFFERS))
            if self._kernel.rounds == 1 and self._device.type == "cpu":
                limit = min(limit, max(TILE_ROWS, TILE_ELEMENTS // num_synthetic))
            self._kept[key] = self._cut(self.rows(split, block, fold), limit)
        return self._kept[key]

    def rows(self, split: str, block: Share, fold: Share) -> np.ndarray:
        """Own rows (ascending). The block and the fold of a row depend on its id alone, as its split does: not on the
        sharding."""
        if (block[1], fold[1]) == (1, 1):
            return self._part.rows_of(split)
        if split not in self._lots:
            rows = self._part.rows_of(split)
            lot = (hash_ids(self._part.node_id, FOLD_SEED) >> np.uint64(32)).astype(np.int64)[rows]
            order = np.argsort(lot, kind="stable")
            self._lots[split] = rows[order], lot[order]
        rows, lot = self._lots[split]
        cell, cells = block[0] * fold[1] + fold[0], block[1] * fold[1]
        edges = [-(-(number << 32) // cells) for number in (cell, cell + 1)]  # lots are below 2^32
        return np.sort(rows[slice(*np.searchsorted(lot, edges))])

    def _cut(self, rows: np.ndarray, limit: int) -> list[Chunk]:
        if not len(rows):
            return []
        fields: list[np.ndarray] = [rows]
        matrices: list[sp.csr_matrix] = []
        for _ in range(self._kernel.rounds - 1):
            sub: sp.csr_matrix = self._propagation()[fields[0]]
            support = np.unique(sub.indices)
            fields.insert(0, support)
            matrices.insert(0, sub[:, support])
        if len(fields[0]) > limit and len(rows) > 1:
            pieces = np.array_split(rows, 2 if matrices else -(-len(rows) // limit))
            return [chunk for piece in pieces for chunk in self._cut(piece, limit)]
        norms = [norm[torch.from_numpy(nodes)].numpy() for norm, nodes in zip(self._norms, fields, strict=True)]
        hops = [
            between_directions(matrix, before, after, self._dtype, self._device)
            for matrix, (before, after) in zip(matrices, pairwise(norms), strict=True)
        ]
        return [Chunk(rows, fields[0], hops)]
