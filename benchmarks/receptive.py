"""How many nodes lie within two hops of the rows that a step or a validation reads: what it would have to encode.

    python benchmarks/receptive.py PREPARED... --out benchmarks/results/receptive.md

Each graph prepared in one part. Training rows are drawn at random, mean of five draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import rig
from scipy.sparse import csr_matrix

from talk_dist import PreparedTag

ROWS = (256, 1024, 4096)
DRAWS = 5


def share(graph: csr_matrix, rows: np.ndarray, hops: int) -> float:
    """Of all nodes, those within ``hops`` of ``rows``; the graph holds every node's edge to itself."""
    reached = np.zeros(graph.shape[0], dtype=np.float32)
    reached[rows] = 1
    for _ in range(hops):
        reached = (graph @ reached > 0).astype(np.float32)
    return float(reached.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for path in arguments.data:
        tag = PreparedTag(path)
        part = tag.partition(0)
        entries = np.ones(len(part.indices), dtype=np.float32)
        graph = csr_matrix((entries, part.indices, part.indptr), shape=(part.num_own, part.num_own))
        train, rng, found = part.rows_of("train"), np.random.default_rng(0), []
        for count in ROWS:
            draws = [rng.choice(train, count, replace=False) for _ in range(DRAWS) if count < len(train)]
            found.append(f"{np.mean([share(graph, d, arguments.hops) for d in draws]):.2f}" if draws else "–")
        everything = (share(graph, part.rows_of(split), arguments.hops) for split in ("train", "val"))
        rows.append([tag.meta["name"], f"{part.num_own:,}", *found, *(f"{value:.2f}" for value in everything)])
        print(rows[-1], flush=True)
    names = [
        "graph",
        "nodes",
        *(f"{count:,} training rows" for count in ROWS),
        "all training",
        "all validation",
    ]
    rig.report(
        arguments.out,
        f"Share of the nodes within {arguments.hops} hops of some rows",
        [rig.table(names, rows)],
        "python benchmarks/receptive.py PREPARED... --out benchmarks/results/receptive.md",
    )


if __name__ == "__main__":
    main()
