"""A shard: one partition of the real graph, its encodings, and its share of every computation.

An ordinary object, built from a `ShardSpec` on storage, that knows nothing of where it lives. Its methods
are pure in their arguments and in the current encoding; arrays that cross its boundary are numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from talk_dist.config import KernelConfig
from talk_dist.data.splits import hash_ids
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError
from talk_dist.kernel.krr import loss_sums
from talk_dist.kernel.sntk import kernel_block, node_norms, propagation, to_torch
from talk_dist.models.gnn import local_graph, self_loops
from talk_dist.models.inner import one_hot
from talk_dist.models.protocol import Adapters, Encoder
from talk_dist.runtime.boundary import LossSpec, Sample, ShardGrads, ShardSpec, StudentState
from talk_dist.runtime.encodings import EncodingCache

TEACHER_ROWS = 8192  # rows that the teacher sees at once
FOLD_SEED = -1  # no split's
LIVE_BUFFERS = 20  # arrays of the size (rows, M) that a kernel block with gradient holds at its peak


def field_names(kernel: KernelConfig) -> list[str]:
    """H, what each hop makes of it before the first layer, and Z, the last of them, that kernel blocks start from."""
    return ["H", *(f"P{hop}" for hop in range(1, kernel.hops - kernel.rounds + 1)), "Z"]


def halo_depth(kernel: KernelConfig) -> int:
    """How deep a halo of Z is needed: a kernel of K rounds reaches K - 1 hops, `sample` and `learn` one."""
    return max(1, kernel.hops - 1) if kernel.architecture == "gcn" else 0


@dataclass(frozen=True)
class _Chunk:
    """Wanted rows and their receptive field: rows of Z, and the sparse matrices of hops 2..K."""

    rows: np.ndarray
    fields: list[np.ndarray]  # local nodes at hop 1..K; the last is ``rows``
    propagations: list[Tensor]


class Shard:
    """Encode, propagate, and answer. Halo rows come from the pool: `requests`, `rows`, `receive`."""

    def __init__(self, spec: ShardSpec, encoder: Encoder):
        self.spec, self.encoder = spec, encoder
        tag = PreparedTag(spec.path)
        tag.check_tokenizer(encoder.config.name, encoder.tokenizer.fingerprint)
        halo_hops = tag.meta["partition"]["halo_hops"]
        if spec.kernel.rounds > halo_hops + 1:
            raise ConfigError(
                f"kernel.hops = {spec.kernel.hops}, but {spec.path} has halos for {halo_hops + 1} hops; "
                f"prepare it again with --halo_hops {spec.kernel.hops - 1}"
            )
        self.num_classes = len(tag.classes)
        self.part = part = tag.partition(spec.part)
        self.dtype = torch.float64 if spec.kernel.precision == "float64" else torch.float32
        self.device = encoder.device
        self._taught: Tensor | None = None  # (n, C) what the teacher says of own rows
        self._propagation = propagation(part.indptr, part.indices, part.degree, spec.kernel.propagation)
        self._depth = np.concatenate([np.zeros(part.num_own, np.int8), part.halo_depth])
        kept = spec.cache and part.encodings is None  # what is given need not be kept
        self._cache = EncodingCache(spec.cache, spec.part, part.tokens) if kept else None
        self._fields: dict[str, np.ndarray] = {}  # name -> (own + halo, width)
        self._encoded_with: str | None = None
        self._chunks: dict[tuple[str, int, int, int], list[_Chunk]] = {}

    # -- encoding and halo exchange -----------------------------------------------------------------------

    def encode(self, adapters: Adapters, progress: Callable[[int, int], None] | None = None) -> bool:
        """Encode own texts with these adapters, or take the encodings that the nodes bring; False if that is what the
        shard already holds."""
        version = EncodingCache.version(adapters)
        if version == self._encoded_with:
            return False
        self._taught = None
        self.encoder.load_adapters(adapters)

        def compute() -> np.ndarray:
            if self.part.encodings is not None:
                return self.part.encodings.astype(np.float32)
            return self.encoder.encode_tokens(self.part.tokens, progress)

        cacheable = self._cache is not None and not adapters
        own = self._cache.get(self.encoder, compute) if cacheable and self._cache else compute()
        self._set("H", own)
        self._encoded_with = version
        return True

    def requests(self, depth: int) -> list[tuple[int, np.ndarray]]:
        """(owner, rows in the owner) of the halo nodes up to ``depth``, in the order `receive` expects."""
        near = self.part.halo_depth <= depth
        owners = self.part.halo_owner[near]
        return [(int(q), self.part.halo_row[near][owners == q]) for q in np.unique(owners)]

    def rows(self, name: str, index: np.ndarray) -> np.ndarray:
        """Own rows of a field, for a neighbour's halo."""
        return self._fields[name][index]

    def receive(self, name: str, depth: int, replies: list[np.ndarray]) -> None:
        """The halo rows of a field, one array for each of `requests`."""
        near = np.flatnonzero(self.part.halo_depth <= depth)
        owners = self.part.halo_owner[near]
        for owner, reply in zip(np.unique(owners), replies, strict=True):
            self._fields[name][self.part.num_own + near[owners == owner]] = reply

    def propagate(self, source: str = "H", target: str = "Z") -> None:
        """target = P source on own rows; the source's direct halo must be there. `field_names` has the names."""
        matrix = to_torch(self._propagation[: self.part.num_own], self.dtype)
        x = torch.from_numpy(self._fields[source]).to(self.dtype)
        self._set(target, (matrix @ x).numpy())

    def measure_norms(self) -> None:
        """Norms of every hop, from Z with its halo. Once per encoding."""
        kernel = self.spec.kernel
        levels = [np.flatnonzero(self._depth < kernel.rounds - hop) for hop in range(kernel.rounds)]
        matrices = []
        for outer, inner in pairwise(levels):
            matrices.append(self._propagation[inner][:, outer])
        z = torch.from_numpy(self._fields["Z"][levels[0]])
        self._norms = node_norms(z, matrices, kernel.layers, kernel.norms, kernel.degree_cap)

    def _set(self, name: str, own: np.ndarray) -> None:
        field = np.zeros((len(self._depth), own.shape[1]), dtype=own.dtype)
        field[: len(own)] = own
        self._fields[name] = field

    # -- the kernel ---------------------------------------------------------------------------------------

    def loss_and_grads(self, h_s: np.ndarray, dual: np.ndarray, loss: LossSpec) -> ShardGrads:
        """Sums over own rows of a fold, chunk by chunk (method, section 4, step 2)."""
        leaf, b = self._tensor(h_s).requires_grad_(), self._tensor(dual)
        total = log_temperature = 0.0
        d_dual = torch.zeros(b.shape, dtype=torch.float64)
        d_hs = torch.zeros(leaf.shape, dtype=torch.float64)
        chunks = self._plan(loss.split, len(h_s), loss.fold, loss.folds)
        for chunk in chunks:
            kernel = self._block(chunk, leaf)
            block = kernel.detach()
            sums = loss_sums(block @ b, self._wanted(chunk.rows, loss).to(block), loss.kind, loss.log_temperature)
            (gradient,) = torch.autograd.grad(kernel, leaf, sums.d_scores @ b.T)
            total += float(sums.loss)
            log_temperature += float(sums.d_log_temperature)
            d_dual += (block.T @ sums.d_scores).double().cpu()
            d_hs += gradient.double().cpu()
        num_rows = sum(len(chunk.rows) for chunk in chunks)
        return ShardGrads(total, num_rows, d_dual.numpy(), d_hs.numpy(), log_temperature)

    def krr_scores(self, h_s: np.ndarray, dual: np.ndarray, split: str) -> np.ndarray:
        """Confusion counts (C, C) [true, predicted] of the kernel predictor on the own rows of ``split``.

        A stack of dual coefficients (R, M, C) gives a stack of counts (R, C, C) from one pass over the kernel.
        """
        counts = np.zeros((*dual.shape[:-2], self.num_classes, self.num_classes), dtype=np.int64)
        s, b = self._tensor(h_s), self._tensor(dual)
        for chunk in self._plan(split, len(h_s)):
            predicted = (self._block(chunk, s) @ b).argmax(-1).cpu().numpy()
            for one in np.ndindex(dual.shape[:-2]):
                np.add.at(counts[one], (self.part.label[chunk.rows], predicted[one]), 1)
        return counts

    def _block(self, chunk: _Chunk, h_s: Tensor) -> Tensor:
        z = self._tensor(self._fields["Z"][chunk.fields[0]])
        norms = [n[torch.from_numpy(f)].to(self.device) for n, f in zip(self._norms, chunk.fields, strict=True)]
        return kernel_block(z, h_s, chunk.propagations, norms, self.spec.kernel.layers)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device, self.dtype)

    def _plan(self, split: str, num_synthetic: int, fold: int = 0, folds: int = 1) -> list[_Chunk]:
        """The rows of ``split`` and ``fold`` in chunks whose kernel block fits kernel.chunk_mib.

        The fold of a row depends on its id alone, as its split does: not on the sharding.
        """
        key = (split, num_synthetic, fold, folds)
        if key not in self._chunks:
            bytes_per_row = num_synthetic * self.dtype.itemsize * LIVE_BUFFERS
            limit = max(1, (self.spec.kernel.chunk_mib << 20) // bytes_per_row)
            rows = self.part.rows_of(split)
            if folds > 1:
                rows = rows[self._lot[rows] * np.uint64(folds) >> np.uint64(32) == fold]
            self._chunks[key] = self._split(rows, limit)
        return self._chunks[key]

    @cached_property
    def _lot(self) -> np.ndarray:
        """(n,) uint64 below 2^32: where in its split a row falls."""
        return hash_ids(self.part.node_id, FOLD_SEED) >> np.uint64(32)

    def _split(self, rows: np.ndarray, limit: int) -> list[_Chunk]:
        if not len(rows):
            return []
        fields: list[np.ndarray] = [rows]
        matrices: list[Tensor] = []
        for _ in range(self.spec.kernel.rounds - 1):
            sub: sp.csr_matrix = self._propagation[fields[0]]
            support = np.unique(sub.indices)
            fields.insert(0, support)
            matrices.insert(0, to_torch(sub[:, support], self.dtype, self.device))
        if len(fields[0]) > limit and len(rows) > 1:
            half = len(rows) // 2
            return self._split(rows[:half], limit) + self._split(rows[half:], limit)
        return [_Chunk(rows, fields, matrices)]

    # -- the student --------------------------------------------------------------------------------------

    def student_begin(self, state: StudentState) -> None:
        part = self.part
        self._student = state.build()
        self._graph = local_graph(
            state.config.kind, part.indptr[: part.num_own + 1], part.indices[: part.indptr[part.num_own]], part.degree
        )
        self._root: Tensor | None = None
        self._fields["X"] = self._fields["H"]

    def student_stage(self, index: int) -> None:
        """One stage of the student on "X", whose direct halo must be there."""
        with torch.no_grad():
            x, self._root = self._student.stage(index, torch.from_numpy(self._fields["X"]), self._graph, self._root)
        self._set("X", x[: self.part.num_own].numpy())

    def student_scores(self, split: str) -> np.ndarray:
        """Confusion counts (C, C) [true, predicted] of "X" on the own rows of ``split``."""
        rows = self.part.rows_of(split)
        counts = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        np.add.at(counts, (self.part.label[rows], self._fields["X"][rows].argmax(1)), 1)
        return counts

    # -- the teacher --------------------------------------------------------------------------------------

    def learn(self, teacher: StudentState) -> None:
        """Targets of all own rows: the class probabilities that the teacher gives P^2 H of a node by itself (Z's halo
        must be there). Forgotten with the encodings."""
        targets, model = torch.zeros(self.part.num_own, self.num_classes), teacher.build()
        for start in range(0, self.part.num_own, TEACHER_ROWS):
            rows = np.arange(start, min(start + TEACHER_ROWS, self.part.num_own))
            features, alone = torch.from_numpy(self._smoothed(rows)), self_loops(len(rows))
            with torch.no_grad():
                targets[rows] = model(features, alone).softmax(1)
        self._taught = targets

    def _wanted(self, rows: np.ndarray, loss: LossSpec) -> Tensor:
        """What the scores of own ``rows`` are compared with (len(rows), C)."""
        if loss.targets == "labels":
            return one_hot(self.part.label[rows], self.num_classes)
        if self._taught is None:
            raise ConfigError('outer.targets = "teacher": nobody has taught these shards since they encoded')
        return self._taught[torch.from_numpy(rows)]

    def _smoothed(self, rows: np.ndarray) -> np.ndarray:
        """P^2 H (len(rows), d) float32, or what the kernel starts from where all hops come first."""
        if self.spec.kernel.architecture == "sgc":
            return self._fields["Z"][rows].astype(np.float32)
        matrix = to_torch(self._propagation[rows], self.dtype)
        return (matrix @ torch.from_numpy(self._fields["Z"]).to(self.dtype)).float().numpy()

    # -- what initialisation and baselines need -------------------------------------------------------------

    def sample(self, per_class: int, seed: int) -> Sample:
        """At most ``per_class`` training rows of each class, with P^2 H as features (Z's halo must be there)."""
        rows = self.part.rows_of("train")
        keys = hash_ids(self.part.node_id, seed)[rows]
        order = np.argsort(keys, kind="stable")
        kept = [order[self.part.label[rows][order] == c][:per_class] for c in range(self.num_classes)]
        chosen = np.concatenate(kept)
        return Sample(keys[chosen], self.part.label[rows[chosen]], rows[chosen], self._smoothed(rows[chosen]))

    def tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        """Token ids of own rows."""
        return [self.part.tokens[int(row)] for row in rows]
