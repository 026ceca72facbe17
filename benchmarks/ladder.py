"""Is the ridge path worth it: the ridge that a trial chooses for nothing, against trials spent on the ridge.

For every prepared graph and seed, the default preset is distilled with each ridge of the ladder. The table says with
which ridge the kernel predictor validates best from the class centres, which one a trial takes (the largest within a
standard error of that), the preset's own, and the best of all trials, each with the student's validation accuracy. No
test node is read.

    python benchmarks/ladder.py PREPARED... --seeds 2 --out benchmarks/results/ladder.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talk_dist import LocalPool, PreparedTag, TextEncoder, preset
from talk_dist.commands.report import machine
from tuning.objective import LADDER, TrialSpec, choose_ridge, ridge_scores, run_trial
from tuning.space import configured

RIDGES = (*LADDER, 0.3, 1.0)


def largest_best(scores: Mapping[float, float]) -> float:
    return max(scores, key=lambda ridge: (scores[ridge], ridge))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rules = ("preset", "best of the ladder", "within an error (used)", "best of 7 trials")
    gained: dict[str, list[float]] = {rule: [] for rule in rules}
    lines = []
    for data in arguments.data:
        tag = PreparedTag(data)
        for seed in range(arguments.seeds):
            base = configured(preset(), {"seed": seed})
            encoder = TextEncoder(base.encoder)
            pool = LocalPool(tag, encoder, base.kernel, base.runtime)
            scores = ridge_scores(pool, encoder, base, RIDGES)
            reached = {ridge: _trial(data, base.to_dict(), ridge) for ridge in RIDGES}
            used = choose_ridge(pool, encoder, base, LADDER)
            chosen = dict(
                zip(rules, (base.kernel.ridge, largest_best(scores), used, largest_best(reached)), strict=True)
            )
            row = [tag.meta["name"], str(seed), *(f"{reached[ridge]:.4f} ({ridge:g})" for ridge in chosen.values())]
            row.append(" ".join(f"{reached[ridge]:.3f}" for ridge in RIDGES))
            for rule, ridge in chosen.items():
                gained[rule].append(reached[ridge])
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    means = " | ".join(f"{sum(values) / len(values):.4f}" for values in gained.values())
    text = "\n".join(
        [
            "# The ridge: chosen by the ladder, or by trials",
            "",
            f"| graph | seed | {' | '.join(rules)} | {', '.join(f'{ridge:g}' for ridge in RIDGES)} |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            f"| mean | | {means} | |",
            "",
            f"Validation accuracy of the student (ridge). Machine: {machine()}.",
            "",
            f"```\npython {shlex.join(sys.argv)}\n```",
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def _trial(data: str, base: dict[str, Any], ridge: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return float(run_trial(TrialSpec(data, folder, base, {"kernel.ridge": ridge}), lambda values: None)["accuracy"])


if __name__ == "__main__":
    main()
