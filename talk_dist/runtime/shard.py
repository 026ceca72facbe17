"""A shard: one partition of the real graph, its encodings, and its share of every computation.

An ordinary object, built from a `ShardSpec` on storage, that knows nothing of where it lives. Its methods
are pure in their arguments and in the current encoding; arrays that cross its boundary are numpy.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from talk_dist.config import KernelConfig
from talk_dist.data.splits import hash_ids
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError
from talk_dist.kernel.krr import loss_sums
from talk_dist.kernel.sntk import (
    TINY,
    KernelBlock,
    node_norms,
    propagation,
    through_lengths,
    to_torch,
)
from talk_dist.models.gnn import Student
from talk_dist.models.inner import one_hot
from talk_dist.models.protocol import Adapters, Encoder, Progress
from talk_dist.runtime.boundary import LossSpec, Sample, ShardGrads, ShardSpec, Share, StudentGrads, StudentState
from talk_dist.runtime.chunks import Chunk, Chunks
from talk_dist.runtime.encodings import EncodingCache
from talk_dist.runtime.fields import Fields
from talk_dist.runtime.lower import LowerStates
from talk_dist.runtime.propagate import propagate
from talk_dist.runtime.student_pass import StudentPass

ENCODED_ROWS = 8192  # texts that are encoded, and kept, at a time
ALONE_ROWS = 8192  # rows that a student sees at once, each by itself
MEASURED_ENTRIES = 1 << 20  # of the adjacency, whose rows are measured at once
SUMMED_ROWS = 1 << 14  # after so many rows single-precision sums are added to those in double precision


def field_names(kernel: KernelConfig) -> list[str]:
    """H, what each hop makes of it before the first layer, and Z, the last of them, that kernel blocks start from."""
    return ["H", *(f"P{hop}" for hop in range(1, kernel.hops - kernel.rounds + 1)), "Z"]


def halo_depth(kernel: KernelConfig) -> int:
    """How deep a halo of Z is needed: a kernel of K rounds reaches K - 1 hops, `sample` and `learn` one."""
    return max(1, kernel.hops - 1) if kernel.architecture == "gcn" else 0


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
        self._teacher: Student | None = None
        self._depth = np.concatenate([np.zeros(part.num_own, np.int8), part.halo_depth])
        kept = spec.cache and part.encodings is None  # what is given need not be kept
        self._cache = EncodingCache(spec.cache, spec.part, part.tokens) if kept else None
        self._fields = Fields(len(self._depth), spec.kernel.fields == "disk", spec.scratch)
        self._encoded_with: str | None = None
        self._lower = None
        if encoder.frozen_layers:
            self._lower = LowerStates(part.tokens, encoder.width, spec.kernel.fields == "disk", spec.scratch)

    # -- encoding and halo exchange -----------------------------------------------------------------------

    def encode(self, adapters: Adapters, progress: Progress | None = None) -> bool:
        """Encode own texts with these adapters, or take the encodings that the nodes bring; False if that is what the
        shard already holds."""
        version = EncodingCache.version(adapters)
        if version == self._encoded_with:
            return False
        self._teacher = self._encoded_with = None
        self.encoder.load_adapters(adapters)
        for start in range(0, self.part.num_own, ENCODED_ROWS):
            own = self._encoded(start, adapters, progress)
            if not start:
                self._fields.blank("H", own.shape[1], own.dtype)
            self._fields.put("H", slice(start, start + len(own)), slice(None), own)
        self._encoded_with = version
        return True

    def _encoded(self, start: int, adapters: Adapters, progress: Progress | None) -> np.ndarray:
        """Encodings of the stretch of own nodes that begins with ``start``."""
        stop = start + ENCODED_ROWS
        if self.part.encodings is not None:
            return self.part.encodings[start:stop].astype(np.float32)

        def tell(done: int, _: int) -> None:
            if progress:
                progress(start + done, self.part.num_own)

        def compute() -> np.ndarray:
            lower = self._lower.stretch(start, stop) if self._lower else None
            return self.encoder.encode_tokens(self.part.tokens.slice(start, stop), tell, lower)

        return compute() if adapters or self._cache is None else self._cache.get(self.encoder, start, compute)

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
            self._fields.put(name, self.part.num_own + near[owners == owner], slice(None), reply)

    def propagate(self, source: str = "H", target: str = "Z") -> None:
        """target = P source on own rows; the source's direct halo must be there. `field_names` has the names."""
        propagate(self.part, self._fields, self.spec.kernel.propagation, source, target, self.dtype, self.device)

    def measure_norms(self) -> None:
        """Norms of every round, from Z with its halo. Once per encoding."""
        self._norms = self._measured()
        self._chunks = Chunks(
            self.part, self.spec.kernel, self.dtype, self.device, self._norms, lambda: self._propagation
        )

    def _measured(self) -> list[Tensor]:
        kernel, z = self.spec.kernel, self._fields["Z"]
        levels = [np.flatnonzero(self._depth < kernel.rounds - hop) for hop in range(kernel.rounds)]
        if len(levels) == 1:  # rows by themselves
            stretches = self.part.stretches(MEASURED_ENTRIES)
            parts = [torch.linalg.vector_norm(self._tensor(z[rows]), dim=1).cpu() for rows in stretches]
            return [torch.cat(parts)]
        matrices = [self._propagation[inner][:, outer] for outer, inner in pairwise(levels)]
        near = self._tensor(z[levels[0]]).cpu()
        return node_norms(near, matrices, kernel.layers, kernel.norms, kernel.degree_cap)

    @cached_property
    def _propagation(self) -> sp.csr_matrix:
        """P with a row for each node that has one."""
        part = self.part
        return propagation(part.indptr, part.indices, part.degree, self.spec.kernel.propagation)

    # -- the kernel ---------------------------------------------------------------------------------------

    def loss_and_grads(self, h_s: np.ndarray, dual: np.ndarray, loss: LossSpec) -> ShardGrads:
        """Sums over own rows of a block and a fold, chunk by chunk (method, section 4, step 2)."""
        total = log_temperature = 0.0
        num_rows = waiting = 0
        leaf, b = self._tensor(h_s), self._tensor(dual)
        pulled, d_hs = torch.zeros_like(leaf), torch.zeros(leaf.shape, dtype=torch.float64)
        d_dual = torch.zeros(b.shape, dtype=torch.float64)
        for chunk in self._chunks.of(loss.split, len(leaf), loss.block, loss.fold):
            kernel = self._block(chunk, leaf)
            wanted = self._wanted(chunk.rows, loss).to(leaf)
            sums = loss_sums(kernel.times(b), wanted, loss.kind, loss.log_temperature)
            total += float(sums.loss)
            log_temperature += float(sums.d_log_temperature)
            d_dual += kernel.transposed_times(sums.d_scores).double().cpu()
            kernel.pull(sums.d_scores, b, pulled)
            num_rows, waiting = num_rows + len(chunk.rows), waiting + len(chunk.rows)
            if waiting >= SUMMED_ROWS:
                d_hs, waiting = d_hs + pulled.double().cpu(), 0
                pulled.zero_()
        d_hs += pulled.double().cpu()
        d_hs = through_lengths(d_hs, leaf.double().cpu(), b.double().cpu(), d_dual)
        return ShardGrads(total, num_rows, d_dual.numpy(), d_hs.numpy(), log_temperature)

    def krr_scores(self, h_s: np.ndarray, dual: np.ndarray, split: str, block: Share = (0, 1)) -> np.ndarray:
        """Confusion counts (C, C) [true, predicted] of the kernel predictor on the own rows of ``split`` and ``block``.

        A stack of dual coefficients (R, M, C) gives a stack of counts (R, C, C) from one pass over the kernel.
        """
        counts = np.zeros((*dual.shape[:-2], self.num_classes, self.num_classes), dtype=np.int64)
        s, b = self._tensor(h_s), self._tensor(dual)
        for chunk in self._chunks.of(split, len(s), block):
            predicted = self._block(chunk, s, keep=False).times(b).argmax(-1).cpu().numpy()
            for one in np.ndindex(dual.shape[:-2]):
                np.add.at(counts[one], (self.part.label[chunk.rows], predicted[one]), 1)
        return counts

    def _block(self, chunk: Chunk, h_s: Tensor, keep: bool = True) -> KernelBlock:
        first, last = self._norms[0], self._norms[-1]
        lengths = first[torch.from_numpy(chunk.support)].to(self.device, self.dtype)
        z = self._tensor(self._fields["Z"][chunk.support]).div_(lengths.clamp_min(TINY)[:, None])
        norms = last[torch.from_numpy(chunk.rows)].to(self.device, self.dtype)
        return KernelBlock(z, h_s, chunk.hops, norms, self.spec.kernel.layers, keep)

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A copy that may be written to."""
        return torch.tensor(array, dtype=self.dtype, device=self.device)

    # -- the student --------------------------------------------------------------------------------------

    def student_begin(self, state: StudentState) -> None:
        self._student = StudentPass(state, self.part, self._fields)

    def student_stage(self, index: int) -> None:
        """One stage of the student on "X", whose direct halo must be there."""
        self._student.stage(index)

    def student_scores(self, split: str) -> np.ndarray:
        """Confusion counts (C, C) [true, predicted] of "X" on the own rows of ``split``."""
        rows = self.part.rows_of(split)
        counts = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        np.add.at(counts, (self.part.label[rows], self._fields["X"][rows].argmax(1)), 1)
        return counts

    def student_grads(self, state: StudentState, loss: LossSpec) -> StudentGrads:
        """Sums over own rows of a block and a fold of the cross-entropy of a student that sees P^2 H of a node by
        itself, as it saw the synthetic nodes (Z's halo must be there), and of its gradient by the weights."""
        model, rows = state.build(), self._chunks.rows(loss.split, loss.block, loss.fold)
        weights, total = dict(model.named_parameters()), 0.0
        sums = {name: np.zeros(value.shape) for name, value in weights.items()}
        for start in range(0, len(rows), ALONE_ROWS):
            some = rows[start : start + ALONE_ROWS]
            logits = model(torch.from_numpy(self._smoothed(some)))
            value = cross_entropy(logits, self._wanted(some, loss).to(logits), reduction="sum")
            total += value.item()
            gradients = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += gradient.numpy()
        return StudentGrads(total, len(rows), sums)

    # -- the teacher --------------------------------------------------------------------------------------

    def learn(self, teacher: StudentState) -> None:
        """Targets of all but the training rows are the class probabilities that the teacher gives P^2 H of a node by
        itself (Z's halo must be there), worked out for the rows whose turn it is. Forgotten with the encodings."""
        self._teacher = teacher.build().to(self.device, self.dtype)

    def _wanted(self, rows: np.ndarray, loss: LossSpec) -> Tensor:
        """What the scores of own ``rows`` are compared with (len(rows), C)."""
        wanted = one_hot(self.part.label[rows], self.num_classes).to(self.dtype)
        if loss.targets == "labels":
            return wanted
        if self._teacher is None:
            raise ConfigError('outer.targets = "teacher": nobody has taught these shards since they encoded')
        unknown = np.flatnonzero(~self.part.labelled("train", rows))
        for start in range(0, len(unknown), ALONE_ROWS):
            some = unknown[start : start + ALONE_ROWS]
            with torch.no_grad():
                wanted[some] = self._teacher(self._tensor(self._smoothed(rows[some]))).softmax(1).cpu()
        return wanted

    def _smoothed(self, rows: np.ndarray) -> np.ndarray:
        """P^2 H (len(rows), d) float32, or what the kernel starts from where all hops come first."""
        if self.spec.kernel.architecture == "sgc":
            return self._fields["Z"][rows].astype(np.float32)
        hop = self._propagation[rows]
        near, columns = np.unique(hop.indices, return_inverse=True)
        matrix = to_torch(sp.csr_matrix((hop.data, columns, hop.indptr), (len(rows), len(near))), self.dtype)
        return (matrix @ torch.from_numpy(self._fields["Z"][near]).to(self.dtype)).float().numpy()

    # -- what initialisation and baselines need -------------------------------------------------------------

    def sample(self, per_class: int, seed: int, split: str) -> Sample:
        """At most ``per_class`` rows of each class in ``split``, with P^2 H as features (Z's halo must be there)."""
        rows = self.part.rows_of(split)
        keys = hash_ids(self.part.node_id, seed)[rows]
        order = np.argsort(keys, kind="stable")
        kept = [order[self.part.label[rows][order] == c][:per_class] for c in range(self.num_classes)]
        chosen = np.concatenate(kept)
        return Sample(keys[chosen], self.part.label[rows[chosen]], rows[chosen], self._smoothed(rows[chosen]))

    def tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        """Token ids of own rows."""
        return [self.part.tokens[int(row)] for row in rows]
