"""One trial: a distillation at a point of the space, worth the validation accuracy of the student it trains.

The test split is never read. Everything a trial leaves lies in its own folder, from which it goes on if it was
cut off.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from talk_dist.commands import preflight
from talk_dist.commands.place import place
from talk_dist.commands.runs import CHECKPOINT, identity
from talk_dist.commands.tune import Tune
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag
from talk_dist.distill import distill
from talk_dist.evaluate import EvaluateConfig
from talk_dist.kernel.krr import ridge_path
from talk_dist.kernel.sntk import synthetic_kernel
from talk_dist.models.gnn import Student
from talk_dist.models.protocol import Encoder
from talk_dist.runtime.callbacks import Callback
from talk_dist.runtime.checkpoint import Checkpoint, DistillState
from talk_dist.runtime.outer import accuracy, student_accuracy
from talk_dist.runtime.pool import ShardPool, add
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.coresets import class_centres, sample_for
from talk_dist.synthetic.init import class_counts, one_hot_labels
from talk_dist.training_sets import train_on
from tuning.space import Value, configured

Report = Callable[[dict[str, Any]], None]
LADDER, STUDENTS = Tune.ladder, Tune.students


@dataclass(frozen=True)
class TrialSpec:
    """All that is needed to run a trial anywhere."""

    data: str
    folder: str
    base: dict[str, Any]
    point: Mapping[str, Value]
    ladder: tuple[float, ...] = LADDER
    students: int = STUDENTS

    @property
    def config(self) -> DistillConfig:
        return configured(DistillConfig.from_dict(self.base), self.point)


class Reporter(Callback):
    """Tells of a trial on its way: the students' best validation accuracy so far.

    Step 0 comes after stage one, of students on the encodings themselves, before a token is fitted; step n after n
    validations of the synthetic set. The kernel predictor, as cheap, is told beside it and does not decide: it orders
    trials worse (benchmarks/results/sweep-fidelity.md).
    """

    def __init__(self, report: Report, best: float = 0.0):
        self.report, self.best, self.started = report, best, time.process_time()

    def progress(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        if stage == "encodings" and done == total:
            self._tell(0, metrics["val"], metrics["krr_val"])

    def epoch(self, record: dict[str, Any]) -> None:
        self.best = max(self.best, record["val_accuracy"])
        self._tell(record["epoch"] + 1, self.best, record["krr_val_accuracy"])

    def _tell(self, step: int, accuracy: float, krr_accuracy: float) -> None:
        facts = {"accuracy": accuracy, "krr_accuracy": krr_accuracy, "cpu_seconds": self.cpu_seconds()}
        self.report({"step": step, **facts})

    def cpu_seconds(self) -> float:
        """Of this process since the trial began: what a busy machine does not change."""
        return round(time.process_time() - self.started, 2)


def run_trial(spec: TrialSpec, report: Report) -> dict[str, Any]:
    """Distil, and say what came of it: `findings.FACTS`.

    ``accuracy`` is the mean validation accuracy of fresh students, trained as `evaluate` trains them: the inner loop's
    own are chosen among so many that the best of them flatters the trial. Raises what distill raises.
    """
    started, config, tag = time.monotonic(), spec.config, PreparedTag(spec.data)
    with place(config) as where:
        encoder = where.encoder()
        problems = preflight.Problems()
        preflight.check_tag(tag, config, ("val",), problems)
        preflight.check_encoder(encoder, config.synthetic.tokens, tag, problems)
        problems.done()
        plan = preflight.planned(tag, config, None)
        path = storage.join(spec.folder, CHECKPOINT)
        pool = where.pool(tag, encoder, plan, Checkpoint(path, {}).threads)
        if spec.ladder and "kernel.ridge" not in spec.point:
            ridge = choose_ridge(pool, encoder, config, spec.ladder)
            config = dataclasses.replace(config, kernel=dataclasses.replace(config.kernel, ridge=ridge))
        checkpoint = Checkpoint(path, identity(tag, encoder, config))
        saved = checkpoint.load()  # what was reported before a cut does not come again
        reporter = Reporter(report, max(saved.best_accuracy, 0.0) if isinstance(saved, DistillState) else 0.0)
        synthetic = distill(pool, encoder, config, [reporter, *where.callbacks], checkpoint)
        synthetic.save_pretrained(storage.join(spec.folder, "synthetic"))
        accuracies = [validate(synthetic, pool, encoder, config, seed) for seed in range(spec.students)]
        host_bytes = pool.vitals().host_bytes
    history = synthetic.metrics["history"]
    seconds = synthetic.metrics["seconds"]
    return {
        "accuracy": float(np.mean(accuracies)),
        "spread": float(np.std(accuracies)),
        "krr_accuracy": max(record["krr_val_accuracy"] for record in history),
        "epochs": len(history) - 1,
        "seconds": round(seconds["start"] + seconds["epochs"], 2),
        "seconds_with_start": round(time.monotonic() - started, 2),
        "cpu_seconds": reporter.cpu_seconds(),
        "bytes": synthetic.num_bytes(),
        "ridge": config.kernel.ridge,
        "host_bytes": sum(host_bytes.values()),
    }


def validate(synthetic: SyntheticTAG, pool: ShardPool, encoder: Encoder, config: DistillConfig, seed: int) -> float:
    """Validation accuracy of one fresh student."""
    student = Student(config.student, encoder.width, synthetic.labels.shape[1], seed)
    encoder.reset_adapters(seed)
    if not encoder.adapted:
        pool.encode({})  # a trial that was cut off after its last epoch has not done it yet
    train_on(synthetic, student, pool, encoder, EvaluateConfig().recipe, seed)
    pool.encode(encoder.adapters())
    return student_accuracy(pool, student, "val")


def choose_ridge(pool: ShardPool, encoder: Encoder, config: DistillConfig, ladder: Sequence[float]) -> float:
    """The largest ridge of the ladder with which the kernel predictor validates within a standard error of the best
    (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3): what more it fits is chance."""
    scores = ridge_scores(pool, encoder, config, ladder)
    best, num_val = max(scores.values()), pool.tag.meta["split_sizes"]["val"]
    error = (best * (1.0 - best) / num_val) ** 0.5
    return max(ridge for ridge, score in scores.items() if score >= best - error)


def ridge_scores(
    pool: ShardPool, encoder: Encoder, config: DistillConfig, ladder: Sequence[float]
) -> dict[float, float]:
    """The kernel predictor's validation accuracy from the class centres, for every ridge of the ladder: one
    eigendecomposition (of each block) and one pass over the validation rows for all of them."""
    encoder.reset_adapters(config.seed)
    pool.encode(encoder.adapters())
    counts = class_counts(pool.tag, config)
    y_s, blocks = one_hot_labels(counts), config.kernel.blocks(int(counts.sum()))
    h_s = torch.from_numpy(class_centres(sample_for(pool, counts, config.seed), counts, config.seed, blocks))
    counts_of = []
    for block in range(blocks):
        own = slice(block, None, blocks)
        k_ss = synthetic_kernel(h_s[own].double(), config.kernel.rounds, config.kernel.layers)
        duals = ridge_path(k_ss, y_s[own], ladder)
        counts_of.append(pool.krr_scores(h_s[own].numpy(), duals.numpy(), "val", (block, blocks)))
    return dict(zip(ladder, map(accuracy, add(counts_of)), strict=True))
