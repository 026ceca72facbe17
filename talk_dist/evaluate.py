"""Train a fresh encoder+GNN on a set of training nodes and score it on the real graph.

The sets: a synthetic TAG, coresets of real texts of the same size, or the full training set. All take the
same recipe; a pass is chosen on validation nodes, and the test nodes are scored once a seed, at the end.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from talk_dist.config import DistillConfig
from talk_dist.errors import DataError
from talk_dist.models.gnn import Student
from talk_dist.models.protocol import Adapters, Encoder, Report
from talk_dist.runtime.boundary import StudentState
from talk_dist.runtime.full import WholeGraph
from talk_dist.runtime.outer import accuracy, macro_f1, student_accuracy
from talk_dist.runtime.pool import ShardPool
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.coresets import allocate
from talk_dist.training import EvaluateConfig
from talk_dist.training_sets import TrainingSet, coreset_tag, full_set, tag_set


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
    chosen: dict[str, float] = field(default_factory=dict)
    """Of the full training set: its learning rate and label smoothing."""


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

    Raises DataError if ``tag`` has other classes than the pool's graph, or that has no validation or test nodes.
    """
    for split in ("val", "test"):
        pool.tag.check_split(split)
    if tag.classes != pool.tag.classes:
        raise DataError("the synthetic set", f"has the classes {tag.classes}, the graph has {pool.tag.classes}")
    encoder.reset_adapters(0)
    pool.encode(encoder.adapters(), lambda done, total: progress("encode", done, total, {}))
    counts = allocate(len(tag), pool.tag.train_class_counts, distilled_with.kernel.blocks(len(tag)))

    def row(name: str) -> Row:
        if name == "full":
            return reference(WholeGraph(pool.tag), pool, encoder, config, progress)
        small, size = tag, tag.num_bytes()
        if name != "synthetic":
            small, size = coreset_tag(pool, encoder, counts, name, distilled_with)
        trained_on = tag_set(name, small, pool, encoder, distilled_with, config.recipe)
        return score(dataclasses.replace(trained_on, bytes=size), pool, encoder, config, progress)

    return [row(name) for name in ("synthetic", *config.against)]


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


def reference(
    whole: WholeGraph,
    pool: ShardPool,
    encoder: Encoder,
    config: EvaluateConfig,
    progress: Report = lambda *_: None,
) -> Row:
    """The row of ``whole``, the pool's graph, with the learning rate and label smoothing whose students validate best:
    the test nodes are read for these alone. Adapters join once both are chosen, on the encodings without them.
    """

    def everything(choice: tuple[float, float], epochs: int) -> TrainingSet:
        rate, share = choice
        return full_set(whole, pool, encoder, dataclasses.replace(config.recipe, gnn_lr=rate), epochs, share)

    def trained(choice: tuple[float, float], epochs: int) -> list[Trained]:
        encoder.reset_adapters(0)  # whatever was tried before
        pool.encode(encoder.adapters())
        name = "full, learning rate {:g}, label smoothing {:g}".format(*choice)
        return list(
            students(dataclasses.replace(everything(choice, epochs), name=name), pool, encoder, config, progress)
        )

    tried = {choice: trained(choice, 0) for choice in itertools.product(config.full_lr, config.full_label_smoothing)}
    best = max(tried, key=lambda choice: float(np.mean([each.val_accuracy for each in tried[choice]])))
    joint = encoder.adapted and config.full_epochs > 0
    found = trained(best, config.full_epochs) if joint else tried[best]
    row = tested(everything(best, config.full_epochs), found, pool, encoder)
    return dataclasses.replace(row, chosen={"gnn_lr": best[0], "label_smoothing": best[1]})


def students(
    trained_on: TrainingSet,
    pool: ShardPool,
    encoder: Encoder,
    config: EvaluateConfig,
    progress: Report = lambda *_: None,
) -> Iterator[Trained]:
    """``config.seeds`` students of a set, scored on the validation nodes alone; the pool holds each one's encodings
    until the next is asked for."""
    passes, facts = 1, dict[str, float]()

    def told(done: int, most: int) -> None:
        nonlocal passes
        passes = most
        progress(trained_on.name, seed * passes + done, config.seeds * passes, facts)

    for seed in range(config.seeds):
        encoder.reset_adapters(seed)
        student = Student(config.student, encoder.width, len(pool.tag.classes), seed)
        trained_on.train(student, seed, told)
        adapters = encoder.adapters()
        pool.encode(adapters)
        trained = Trained(StudentState.of(student), adapters, student_accuracy(pool, student, "val"))
        facts = {"val": trained.val_accuracy}
        told(passes, passes)  # also those that were not needed
        yield trained


def tested(trained_on: TrainingSet, trained: Iterable[Trained], pool: ShardPool, encoder: Encoder) -> Row:
    """The row of a set's students, each scored once on the test nodes.

    The pool ends with the encodings of an encoder that nothing has adapted.
    """
    scores: list[tuple[float, float, float]] = []
    for each in trained:
        pool.encode(each.adapters)  # nothing to do for students that come straight from `students`
        test = pool.student_scores(each.student, "test")
        scores.append((accuracy(test), macro_f1(test), each.val_accuracy))
    encoder.reset_adapters(0)
    pool.encode(encoder.adapters())
    test_accuracy, f1, val_accuracy = zip(*scores, strict=True)
    known = trained_on.name, trained_on.nodes, trained_on.bytes
    return Row(*known, test_accuracy, f1, val_accuracy, trained_on.krr_accuracy)


def retention(rows: Sequence[Row], row: Row) -> float | None:
    """Mean test accuracy relative to the full training set's; None without it, or if it is right nowhere."""
    full = next((r for r in rows if r.name == "full" and max(r.accuracy) > 0), None)
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
