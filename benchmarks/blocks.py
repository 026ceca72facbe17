"""What it costs to deal the synthetic nodes out to blocks with kernels of their own, against one kernel of all.

Stage one with the preset, from centres of the same blocks; validation accuracy of three students on the encodings, and
of the kernel predictor, each real row by its block's. No test node is read.

    python benchmarks/blocks.py PREPARED... --out benchmarks/results/blocks.md
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path

from cases import Case, report, spread

from talk_dist import PreparedTag, preset
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.outer import Objective, accuracy
from talk_dist.synthetic.init import num_synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--size", type=float, default=0.01)
    parser.add_argument("--cache", default="", help="folder of kept encodings")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found, config = defaultdict(list), preset()
    for seed, path in enumerate(arguments.data):
        for wanted in arguments.blocks:
            size = -(-num_synthetic(arguments.size, PreparedTag(path).num_nodes) // wanted)
            if wanted > 1 and size < 16:
                continue
            changed = dataclasses.replace(
                config,
                kernel=dataclasses.replace(config.kernel, block=size),
                synthetic=dataclasses.replace(config.synthetic, size=arguments.size),
                runtime=RuntimeConfig(threads=1, cache_folder=arguments.cache),
            )
            case = Case(path, int(path[-1]) if path[-1].isdigit() else seed, changed)
            assert case.config.kernel.blocks(len(case.h_s)) == wanted
            krr = accuracy(Objective(case.pool, case.config).krr_counts(case.h_s, case.y_s, "val"))
            key = case.tag.meta["name"], len(case.h_s), wanted
            found[key].append((krr, case.scores(case.h_s)))
            print(path, wanted, found[key][-1], flush=True)
    lines = ["| graph | synthetic nodes | blocks | student, validation | KRR, validation |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for (name, m, blocks), runs in found.items():
        students = spread([score for _, scores in runs for score in scores])
        lines.append(f"| {name} | {m} | {blocks} | {students} | {spread([krr for krr, _ in runs])} |")
    report("Synthetic nodes in blocks", lines, arguments.out)


if __name__ == "__main__":
    main()
