"""What a second encoding of the real texts costs if the last layers alone have adapters (`encoder.adapted_layers`).

    python benchmarks/layers.py PREPARED --runs RUN... --out benchmarks/results/layers.md

Every encoder keeps, at its first encoding, what enters the first layer with adapters, in half precision on disk as
with `kernel.fields: disk`. Then all encode again, in turn, with other adapters. One thread. ``--runs``: folders of
`talk-dist distill`, whose validation accuracy is set beside each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import rig
import torch

from talk_dist import PreparedTag, SyntheticTAG, TextEncoder, preset
from talk_dist.runtime.lower import LowerStates

ADAPTED = (6, 3, 2, 1)
DISTILL = r"""talk-dist distill --data cora_cane-64 --out run-$SEED-$LAYERS --seed $SEED \
  --encoder.adapters true --encoder.adapted_layers $LAYERS --inner.passes 60 --outer.epochs 2 --runtime.threads 1"""


class Case:
    """An encoder with adapters on its ``layers`` last layers, and what it keeps of ``tag``'s texts after `once`."""

    def __init__(self, tag: PreparedTag, layers: int, pooling: Literal["auto", "cls", "mean"], scratch: str, rows: int):
        config = dataclasses.replace(preset().encoder, adapters=True, adapted_layers=layers, pooling=pooling)
        self.encoder, self.name = TextEncoder(config), f"{layers} of 6, {pooling}"
        self.tokens = tag.partition(0).tokens.slice(0, rows or tag.meta["parts"][0]["nodes"])
        self.states = LowerStates(self.tokens, self.encoder.width, True, scratch)
        self.bytes = self.states.stretch(0, len(self.tokens)).values.nbytes if self.encoder.frozen_layers else 0
        self.seconds: list[float] = []
        self.error = 0.0

    def encode(self, kept: bool) -> np.ndarray:
        lower = self.states.stretch(0, len(self.tokens)) if kept and self.encoder.frozen_layers else None
        return self.encoder.encode_tokens(self.tokens, None, lower)

    def once(self, seed: int = 0) -> None:
        """The first encoding, and how far one from what is kept is from a whole one with the same adapters."""
        self.encode(kept=True)
        rng = np.random.default_rng(seed)
        adapters = self.encoder.adapters()
        self.encoder.load_adapters({name: rng.normal(0, 0.02, value.shape) for name, value in adapters.items()})
        whole = self.encode(kept=False)
        self.error = float(np.linalg.norm(self.encode(kept=True) - whole) / np.linalg.norm(whole))

    def again(self) -> None:
        started = time.perf_counter()
        self.encode(kept=True)
        self.seconds.append(time.perf_counter() - started)


def accuracies(runs: Sequence[Path]) -> list[str]:
    """What runs that differ in adapted layers and seed alone reached on validation nodes."""
    found = defaultdict(list)
    for run in runs:
        settings, records = SyntheticTAG.from_pretrained(str(run / "synthetic")).config["distill"], rig.records(run)
        best = max(records, key=lambda record: record["val_accuracy"])
        found[settings["encoder"]["adapted_layers"]].append((best["val_accuracy"], best["krr_val_accuracy"]))
    if not found:
        return []
    rows = [
        [
            str(layers or "all"),
            len(scores),
            *(", ".join(f"{value:.4f}" for value in column) for column in zip(*scores, strict=True)),
        ]
        for layers, scores in sorted(found.items())
    ]
    names = ["layers with adapters", "runs", "validation accuracy of the best epoch", "its kernel predictor's"]
    return ["Distilled with each, seed by seed:", rig.table(names, rows), f"```\n{DISTILL}\n```"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=0, help="so many texts (0: all of the first part)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tag = PreparedTag(arguments.data)
    with tempfile.TemporaryDirectory() as scratch:
        cases = [
            Case(tag, layers, pooling, scratch, arguments.rows) for pooling in ("mean", "cls") for layers in ADAPTED
        ]
        for case in cases:
            case.once()
        for _ in range(arguments.repeats):
            for case in cases:
                case.again()
    lines = []
    for case in cases:
        ratios = sorted(one / base for one, base in zip(case.seconds, cases[0].seconds, strict=True))
        spread = [f"{value:.3f}" for value in (statistics.median(ratios), ratios[0], ratios[-1])]
        error = f"{case.error:.1e}" if case.bytes else "–"
        lines.append([case.name, *spread, f"{case.bytes / (1 << 20):.0f} MiB", error])
    texts, precision = len(cases[0].tokens), "bfloat16 autocast" if cases[0].encoder.autocast else "float32"
    rig.report(
        arguments.out,
        f"A second encoding of {texts:,} texts of {tag.meta['name']} by the layers with adapters",
        [
            f"MiniLM, {len(cases[0].tokens.values):,} tokens, {precision}. Seconds relative to the first row in the "
            f"same round, {arguments.repeats} rounds in turn: median, least, most. Then what is kept, and the distance "
            "of encodings from it to those of whole passes with the same adapters, relative to their length.",
            rig.table(["layers with adapters, pooling", "median", "least", "most", "kept", "distance"], lines),
            *accuracies(arguments.runs),
        ],
        f"python benchmarks/layers.py {Path(arguments.data).name} --rows {arguments.rows} --repeats "
        f"{arguments.repeats} --runs {' '.join(run.name for run in arguments.runs)} "
        "--out benchmarks/results/layers.md",
    )


if __name__ == "__main__":
    main()
