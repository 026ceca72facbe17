"""What the benchmarks of stage two share: a prepared graph after stage one, and what tokens for it are worth."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from talk_dist import EvaluateConfig, LocalPool, PreparedTag, TextEncoder, preset
from talk_dist.commands.report import machine
from talk_dist.config import DistillConfig
from talk_dist.evaluate import Row
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings, smoothed
from talk_dist.runtime.outer import student_accuracy
from talk_dist.runtime.teacher import RealSide
from talk_dist.synthetic.coresets import class_centres, sample_for
from talk_dist.synthetic.init import choose, class_counts, embed, one_hot_labels, optimise_encodings


class Case:
    """Encodings ``h_s`` (M, d) and labels ``y_s`` (M, C) of stage one with the preset; `medoids` to start from."""

    def __init__(self, path: str, seed: int, config: DistillConfig | None = None):
        torch.set_num_threads(1)
        self.path, self.tag = path, PreparedTag(path)
        self.config = dataclasses.replace(config or preset(), seed=seed)
        self.encoder = TextEncoder(self.config.encoder)
        self.pool = LocalPool(self.tag, self.encoder, self.config.kernel, self.config.runtime)
        real = RealSide(self.pool, self.config)
        real.encode(self.encoder, lambda *_: None)
        real.teach(lambda *_: None)
        self.counts = class_counts(self.tag, self.config)
        self.sample = sample_for(self.pool, self.counts, seed)
        blocks = self.config.kernel.blocks(int(self.counts.sum()))
        start = torch.from_numpy(class_centres(self.sample, self.counts, seed, blocks))
        classes = one_hot_labels(self.counts)
        self.y_s = smoothed(classes, self.config.synthetic.label_smoothing)
        self.found: dict[int, Tensor] = {}  # by T: the tokens that `fit_tokens` found
        self.h_s = optimise_encodings(self.pool, start, classes, self.config, lambda *_: None).h_s

    def medoids(self, tokens: int) -> Tensor:
        """Token embeddings (M, T, d_tok) of medoid texts."""
        return embed(self.encoder, choose(self.pool, self.sample, self.counts, "medoid", self.config), tokens)

    def residual(self, x: Tensor, nodes: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Of ``x`` (m, T, d_tok), which are ``nodes``: squared distances (m,) and their gradients."""
        return self.encoder.residual(x, self.h_s[nodes])

    def error(self, x: Tensor) -> float:
        """||enc(x) - h||^2 / ||h||^2 over all nodes."""
        return float(self.residual(x)[0].sum() / self.h_s.square().sum())

    def scores(self, h: Tensor, split: str = "val", students: int = 3) -> list[float]:
        """Accuracies of students trained on encodings ``h`` (M, d), their pass chosen on validation nodes."""
        found = []
        for seed in range(students):
            student, recipe = Student(self.config.student, h.shape[1], self.y_s.shape[1], seed), EvaluateConfig().recipe
            fit_encodings(
                student, h, self.y_s, recipe, seed=seed, select=lambda s: student_accuracy(self.pool, s, "val")
            )
            found.append(student_accuracy(self.pool, student, split))
        return found


def merge(rows: Sequence[Row]) -> Row:
    """The same row of several splits as one."""
    krr = [row.krr_accuracy for row in rows if row.krr_accuracy is not None]
    nodes, size = (round(float(np.mean([getattr(row, name) for row in rows]))) for name in ("nodes", "bytes"))
    accuracy, macro_f1, validation = (
        tuple(v for row in rows for v in getattr(row, n)) for n in ("accuracy", "macro_f1", "val_accuracy")
    )
    return Row(rows[0].name, nodes, size, accuracy, macro_f1, validation, float(np.mean(krr)) if krr else None)


def report(title: str, lines: Sequence[str], out: Path | None) -> None:
    """Print a result file, and write it if ``out`` is given: a table, how it was made, and where."""
    about = f"Mean ± standard deviation over the graphs' splits, × 3 students. Machine: {machine()}."
    text = "\n\n".join([f"# {title}", "\n".join(lines), about, f"```\npython {shlex.join(sys.argv)}\n```\n"])
    print(text)
    if out:
        out.write_text(text)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"
