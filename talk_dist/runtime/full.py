"""The full-data reference: a student, and adapters if there are any, trained on all real training nodes.

What every synthetic set is measured against, by the same `train`. It holds the whole graph in one process.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse as sp
import torch
from torch.nn.functional import cross_entropy

from talk_dist.config import InnerConfig
from talk_dist.data.tag import PreparedTag, TokenLists
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import TextEncoder
from talk_dist.models.gnn import Student, local_graph
from talk_dist.models.inner import train
from talk_dist.models.protocol import Encoder, FitResult, Progress
from talk_dist.runtime.outer import student_accuracy
from talk_dist.runtime.pool import ShardPool

BATCH = 32  # training nodes whose texts are encoded with gradient at once


class WholeGraph:
    """All partitions side by side, node order as in ``ShardPool.gather``."""

    def __init__(self, tag: PreparedTag):
        parts = [tag.partition(index) for index in range(tag.num_parts)]
        starts = np.cumsum([0] + [part.num_own for part in parts])
        rows, columns = [], []
        for start, part in zip(starts, parts, strict=False):
            local = np.concatenate([start + np.arange(part.num_own), starts[part.halo_owner] + part.halo_row])
            entries = part.indptr[part.num_own]
            rows.append(np.repeat(local[: part.num_own], np.diff(part.indptr[: part.num_own + 1])))
            columns.append(local[part.indices[:entries]])
        total = int(starts[-1])
        row, column = np.concatenate(rows), np.concatenate(columns)
        matrix = sp.csr_matrix((np.ones(len(row), np.int8), (row, column)), shape=(total, total))
        self.indptr, self.indices = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
        self.degree = np.diff(self.indptr)
        self.label = np.concatenate([part.label for part in parts]).astype(np.int64)
        self.train = np.concatenate([start + part.rows_of("train") for start, part in zip(starts, parts, strict=False)])
        lengths = np.concatenate([np.diff(part.tokens.offsets) for part in parts])
        values = np.concatenate([part.tokens.values for part in parts])
        self.tokens = TokenLists(np.concatenate([[0], np.cumsum(lengths)]), values)


def fit_full(
    encoder: Encoder,
    student: Student,
    pool: ShardPool,
    whole: WholeGraph,
    config: InnerConfig,
    epochs: int,
    *,
    label_smoothing: float = 0.0,
    seed: int,
    progress: Progress | None = None,
) -> FitResult:
    """Train on every training node, choosing the pass by validation accuracy; ``label_smoothing`` is the share of each
    label that is spread over all classes.

    First full-batch passes over the encodings; with adapters then ``epochs`` of mini-batches whose own texts are
    encoded with gradient, while their neighbours keep the encodings of the last epoch.
    """
    if encoder.adapted and not isinstance(encoder, TextEncoder):
        raise ConfigError(
            "training adapters on the full set needs the language model in one process: leave `full` out of "
            "--evaluation.against, or set deepspeed.workers to 0"
        )
    pool.encode(encoder.adapters())
    graph = local_graph(student.config, whole.indptr, whole.indices, whole.degree)
    h, train_rows = torch.from_numpy(pool.gather()).float(), torch.from_numpy(whole.train)
    labels = torch.from_numpy(whole.label)

    def whole_batch(index: int) -> torch.Tensor:
        loss = cross_entropy(student(h, graph)[train_rows], labels[train_rows], label_smoothing=label_smoothing)
        loss.backward()
        return loss.detach()

    def validated(current: Student) -> float:
        return student_accuracy(pool, current, "val")

    first = train(whole_batch, student, config, seed=seed, select=validated, progress=progress)
    if not isinstance(encoder, TextEncoder) or not encoder.adapted or not epochs:
        return first
    count, generator = -(-len(train_rows) // BATCH), np.random.default_rng(seed)
    batches = [rows for _ in range(epochs) for rows in np.array_split(generator.permutation(whole.train), count)]

    def mini_batch(index: int) -> torch.Tensor:
        rows = batches[index - 1]
        ids, mask = map(torch.from_numpy, whole.tokens.padded(rows))
        fresh = encoder.forward_embeds(encoder.token_table[ids.to(encoder.device)], mask, seed + index).cpu()
        mixed = h.index_copy(0, torch.from_numpy(rows), fresh)
        loss = cross_entropy(student(mixed, graph)[rows], labels[rows], label_smoothing=label_smoothing)
        loss.backward()
        return loss.detach()

    def refresh(current: Student) -> float:
        pool.encode(encoder.adapters())
        h.copy_(torch.from_numpy(pool.gather()))
        return validated(current)

    steps = len(batches)
    joint = dataclasses.replace(config, passes=steps, adapter_passes=0, patience=steps, target_loss=0.0)
    joint = dataclasses.replace(joint, adapter_select_every=count, select_patience=0)
    found = first.selected
    return train(
        mini_batch, student, joint, encoder=encoder, seed=seed, select=refresh, selected=found, progress=progress
    )
