"""Train a fresh encoder+GNN on a set of training nodes and score it on the real graph.

The sets: a synthetic TAG, coresets of real texts of the same size, or the full training set. All take the
same recipe; a pass is chosen on validation nodes, and the test nodes are scored once a seed, at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from talk_dist.config import DistillConfig, InnerConfig, StudentConfig
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import TextEncoder
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings, one_hot, smoothed
from talk_dist.models.protocol import Adapters, Encoder, Report
from talk_dist.runtime.boundary import StudentState
from talk_dist.runtime.full import WholeGraph, fit_full
from talk_dist.runtime.outer import Objective, accuracy, macro_f1, student_accuracy
from talk_dist.runtime.pool import ShardPool
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.coresets import METHODS, allocate, sample_for, select

Against = Literal["full", "random", "herding", "kcenter", "medoid"]


@dataclass(frozen=True)
class EvaluateConfig:
    """How students are trained and compared."""

    against: tuple[Against, ...] = ("full", "random", "herding", "kcenter", "medoid")
    """The full training set and coresets of the same size."""
    seeds: int = 5
    """Students trained from so many seeds; the table shows mean ± standard deviation."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The student."""
    recipe: InnerConfig = field(default_factory=lambda: InnerConfig(patience=50))
    """How every student is trained, whatever it is trained on."""
    full_epochs: int = 4
    """With adapters: epochs of joint training on the full training set."""

    def __post_init__(self) -> None:
        unknown = set(self.against) - set(get_args(Against))
        if unknown or self.seeds < 1:
            raise ConfigError(f"evaluate: seeds must be at least 1, against one of {get_args(Against)}")


@dataclass(frozen=True)
class Row:
    """One training set: scores of its students on the real test nodes, one per seed."""

    name: str
    nodes: int
    bytes: int
    accuracy: tuple[float, ...]
    macro_f1: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    krr_accuracy: float | None


@dataclass(frozen=True)
class TrainingSet:
    """What students are trained on: ``train(student, seed)`` trains one, and the encoder's adapters if it has any."""

    name: str
    nodes: int
    bytes: int
    train: Callable[[Student, int], None]
    krr_accuracy: float | None = None  # of the kernel predictor on the test nodes


@dataclass(frozen=True)
class Trained:
    """A student, and the adapters beside it, as training left them."""

    student: StudentState
    adapters: Adapters
    val_accuracy: float


def evaluate(
    pool: ShardPool,
    encoder: Encoder,
    tag: SyntheticTAG,
    distilled_with: DistillConfig,
    config: EvaluateConfig,
    progress: Report = lambda *_: None,
) -> list[Row]:
    """One row for ``tag`` ("synthetic"), then one for each of ``config.against``.

    Raises DataError if ``tag`` belongs to another graph's classes.
    """
    encoder.reset_adapters(0)
    pool.encode(encoder.adapters(), lambda done, total: progress("encode", done, total, {}))
    counts = allocate(len(tag), pool.tag.train_class_counts)

    def made(name: str) -> TrainingSet:
        if name == "synthetic":
            return token_set(name, tag, pool, encoder, distilled_with, config.recipe)
        if name == "full":
            return full_set(WholeGraph(pool.tag), pool, encoder, config.recipe, config.full_epochs)
        coreset, size = coreset_tag(pool, encoder, counts, name, distilled_with)
        return dataclasses.replace(token_set(name, coreset, pool, encoder, distilled_with, config.recipe), bytes=size)

    return [score(made(name), pool, encoder, config, progress) for name in ("synthetic", *config.against)]


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
    if pool.tag.encoding_width is not None:
        return SyntheticTAG(torch.from_numpy(sample.features[rows])[:, None], labels), 2 * sample.features[rows].size
    tokens = pool.tokens(sample.place[rows])
    ids, mask = map(torch.from_numpy, tokens.padded(np.arange(len(tokens))))
    embeds = encoder.token_table.cpu()[ids]
    return SyntheticTAG(embeds, labels, mask), int(tokens.values.nbytes)


def token_set(
    name: str, tag: SyntheticTAG, pool: ShardPool, encoder: Encoder, distilled_with: DistillConfig, recipe: InnerConfig
) -> TrainingSet:
    """A synthetic TAG as a training set. The kernel predictor is scored on the encodings of an encoder that nothing
    has adapted: the pool must hold such ones."""
    tag = tag.embedded(encoder.token_table)
    h_s = encoder.encode_embeds(tag.token_embeds, tag.mask)
    krr = accuracy(Objective(pool, distilled_with).krr_counts(h_s, tag.labels, "test"))

    def train(student: Student, seed: int) -> None:
        train_on(tag, student, pool, encoder, recipe, seed)

    return TrainingSet(name, len(tag), tag.num_bytes(), train, krr)


def encoded_set(
    name: str, tag: SyntheticTAG, pool: ShardPool, distilled_with: DistillConfig, recipe: InnerConfig
) -> TrainingSet:
    """Encodings (M, 1, d) in the place of token embeddings: they train students of a frozen encoder alone."""
    h_s = tag.token_embeds[:, 0]
    krr = accuracy(Objective(pool, distilled_with).krr_counts(h_s, tag.labels, "test"))

    def train(student: Student, seed: int) -> None:
        fit_encodings(student, h_s, tag.labels, recipe, seed=seed, select=lambda s: student_accuracy(pool, s, "val"))

    return TrainingSet(name, len(tag), tag.num_bytes(), train, krr)


def full_set(whole: WholeGraph, pool: ShardPool, encoder: Encoder, recipe: InnerConfig, epochs: int) -> TrainingSet:
    """Every training node of ``whole``, the pool's graph; with adapters ``epochs`` of joint training."""
    meta = pool.tag.meta

    def train(student: Student, seed: int) -> None:
        fit_full(encoder, student, pool, whole, recipe, epochs, seed=seed)

    return TrainingSet("full", meta["split_sizes"]["train"], meta["text"]["train_bytes"], train)


def train_on(
    tag: SyntheticTAG, student: Student, pool: ShardPool, encoder: Encoder, recipe: InnerConfig, seed: int
) -> None:
    """Train ``student``, and the encoder's adapters if it has any, on a small set, and keep the pass that validates
    best; of adapters on workers, which cannot be asked in between, that of the lowest training loss."""

    def validated(trained: Student) -> float:
        pool.encode(encoder.adapters())
        return student_accuracy(pool, trained, "val")

    choose = validated if not encoder.adapted or isinstance(encoder, TextEncoder) else None
    encoder.fit(student, tag.token_embeds, tag.labels, recipe, mask=tag.mask, seed=seed, select=choose)


def score(
    trained_on: TrainingSet,
    pool: ShardPool,
    encoder: Encoder,
    config: EvaluateConfig,
    progress: Report = lambda *_: None,
) -> Row:
    """Train ``config.seeds`` students on a set and score each once on the test nodes.

    The pool ends with the encodings of an encoder that nothing has adapted.
    """
    return tested(trained_on, students(trained_on, pool, encoder, config, progress), pool, encoder)


def students(
    trained_on: TrainingSet,
    pool: ShardPool,
    encoder: Encoder,
    config: EvaluateConfig,
    progress: Report = lambda *_: None,
) -> Iterator[Trained]:
    """``config.seeds`` students of a set, scored on the validation nodes alone; the pool holds each one's encodings
    until the next is asked for."""
    for seed in range(config.seeds):
        encoder.reset_adapters(seed)
        student = Student(config.student, encoder.width, len(pool.tag.classes), seed)
        trained_on.train(student, seed)
        adapters = encoder.adapters()
        pool.encode(adapters)
        trained = Trained(StudentState.of(student), adapters, student_accuracy(pool, student, "val"))
        progress(trained_on.name, seed + 1, config.seeds, {"val": trained.val_accuracy})
        yield trained


def tested(trained_on: TrainingSet, trained: Iterable[Trained], pool: ShardPool, encoder: Encoder) -> Row:
    """The row of a set's students, each scored once on the test nodes.

    The pool ends with the encodings of an encoder that nothing has adapted.
    """
    scores: list[tuple[float, float, float]] = []
    for each in trained:
        pool.encode(each.adapters)  # nothing to do for students that come straight from `students`
        (test,) = pool.student_scores(each.student, ["test"])
        scores.append((accuracy(test), macro_f1(test), each.val_accuracy))
    encoder.reset_adapters(0)
    pool.encode(encoder.adapters())
    test_accuracy, f1, val_accuracy = zip(*scores, strict=True)
    known = trained_on.name, trained_on.nodes, trained_on.bytes
    return Row(*known, test_accuracy, f1, val_accuracy, trained_on.krr_accuracy)


def retention(rows: Sequence[Row], row: Row) -> float | None:
    """Mean test accuracy relative to the full training set's; None without it."""
    full = next((r for r in rows if r.name == "full"), None)
    return None if full is None else float(np.mean(row.accuracy) / np.mean(full.accuracy))


def table(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table."""
    lines = [
        "| trained on | nodes | bytes | test accuracy | macro-F1 | KRR accuracy | retention |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        kept = retention(rows, row)
        lines.append(
            f"| {row.name} | {row.nodes:,} | {row.bytes:,} | {_spread(row.accuracy)} | {_spread(row.macro_f1)} | "
            f"{_known(row.krr_accuracy)} | {_known(kept)} |"
        )
    return "\n".join(lines)


def as_metrics(rows: Sequence[Row], config: EvaluateConfig) -> dict[str, Any]:
    """What goes into the artifact's metrics.json."""
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "retention": {row.name: retention(rows, row) for row in rows},
        "config": dataclasses.asdict(config),
        "markdown": table(rows),
    }


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"
