"""What students are trained on: a synthetic TAG, a coreset of real texts, encodings, or every real training node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from talk_dist.config import DistillConfig, InnerConfig
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import TextEncoder
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings, one_hot, smoothed
from talk_dist.models.protocol import Encoder, Progress
from talk_dist.runtime.full import WholeGraph, fit_full
from talk_dist.runtime.outer import Objective, accuracy, student_accuracy
from talk_dist.runtime.pool import ShardPool
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.coresets import METHODS, sample_for, select


@dataclass(frozen=True)
class TrainingSet:
    """What students are trained on: ``train(student, seed, progress)`` trains one, and the encoder's adapters if it has
    any."""

    name: str
    nodes: int
    bytes: int
    train: Callable[[Student, int, Progress], None]
    krr_accuracy: float | None = None  # of the kernel predictor on the test nodes


def coreset_tag(
    pool: ShardPool, encoder: Encoder, counts: np.ndarray, method: str, config: DistillConfig
) -> tuple[SyntheticTAG, int]:
    """Real texts as a TAG of token embeddings with a mask, labels softened as a distilled set's, and the bytes of their
    token ids (int32).

    Of a graph that brings encodings: the propagated encodings P^2 H (M, 1, d) of the chosen rows, at float16's bytes.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown coreset {method!r}; one of {sorted(METHODS)}")
    sample = sample_for(pool, counts, config.seed)
    rows = select(sample, counts, method, config.seed)
    labels = smoothed(one_hot(sample.label[rows], len(counts)), config.synthetic.label_smoothing)
    about = {"classes": pool.tag.classes}
    if pool.tag.encoding_width is not None:
        x = torch.from_numpy(sample.features[rows])[:, None]
        return SyntheticTAG(x, labels, config=about), 2 * sample.features[rows].size
    tokens = pool.tokens(sample.place[rows])
    ids, mask = map(torch.from_numpy, tokens.padded(np.arange(len(tokens))))
    embeds = encoder.token_table.cpu()[ids]
    return SyntheticTAG(embeds, labels, mask, about), int(tokens.values.nbytes)


def tag_set(
    name: str, tag: SyntheticTAG, pool: ShardPool, encoder: Encoder, distilled_with: DistillConfig, recipe: InnerConfig
) -> TrainingSet:
    """A synthetic TAG as a training set. The kernel predictor is scored on the encodings of an encoder that nothing
    has adapted: the pool must hold such ones."""
    tag = tag.embedded(encoder.token_table)
    h_s = tag.encode(encoder)
    krr = accuracy(Objective(pool, distilled_with).krr_counts(h_s, tag.labels, "test"))

    def train(student: Student, seed: int, progress: Progress) -> None:
        train_on(tag, student, pool, encoder, recipe, seed, progress)

    return TrainingSet(name, len(tag), tag.num_bytes(), train, krr)


def full_set(
    whole: WholeGraph, pool: ShardPool, encoder: Encoder, recipe: InnerConfig, epochs: int, label_smoothing: float
) -> TrainingSet:
    """Every training node of ``whole``, the pool's graph; with adapters ``epochs`` of joint training."""
    meta = pool.tag.meta

    def train(student: Student, seed: int, progress: Progress) -> None:
        fit_full(
            encoder, student, pool, whole, recipe, epochs, label_smoothing=label_smoothing, seed=seed, progress=progress
        )

    return TrainingSet("full", meta["split_sizes"]["train"], meta["text"]["train_bytes"], train)


def train_on(
    tag: SyntheticTAG,
    student: Student,
    pool: ShardPool,
    encoder: Encoder,
    recipe: InnerConfig,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train ``student``, and the encoder's adapters if it has any, on a small set, and keep the pass that validates
    best; of adapters on workers, which cannot be asked in between, that of the lowest training loss. Encodings train
    the student alone."""

    def validated(trained: Student) -> float:
        pool.encode(encoder.adapters())
        return student_accuracy(pool, trained, "val")

    choose = validated if not encoder.adapted or isinstance(encoder, TextEncoder) else None
    if tag.encoded:
        labels, h_s = tag.labels, tag.token_embeds[:, 0]
        fit_encodings(student, h_s, labels, recipe, seed=seed, select=validated, progress=progress)
        return
    encoder.fit(
        student, tag.token_embeds, tag.labels, recipe, mask=tag.mask, seed=seed, select=choose, progress=progress
    )
