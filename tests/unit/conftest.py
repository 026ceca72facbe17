"""Graphs to prepare: small ones made here, and the real ones of a folder beside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

WORDS = ["graph", "node", "edge", "text", "kernel", "ridge", "label", "token", "shard", "halo", "degree", "hub"]


def random_tables(seed: int, num_nodes: int, num_edges: int, num_classes: int = 3) -> tuple[pa.Table, pa.Table]:
    """Sparse integer ids in no order, a tenth of the nodes unlabelled; directed edges with repeats and loops."""
    rng = np.random.default_rng(seed)
    node_id = rng.choice(10 * num_nodes, num_nodes, replace=False)
    label = rng.integers(0, num_classes, num_nodes)
    label[rng.random(num_nodes) < 0.1] = -1
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(num_nodes)]
    ends = rng.integers(0, num_nodes, (2, num_edges))
    nodes = pa.table({"node_id": node_id, "text": texts, "label": label})
    return nodes, pa.table({"src": node_id[ends[0]], "dst": node_id[ends[1]]})


@pytest.fixture
def tables() -> tuple[pa.Table, pa.Table]:
    return random_tables(seed=5, num_nodes=60, num_edges=150)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set; skips the test where it is absent."""
    root = Path(os.environ.get("TALK_DIST_DATA", Path(__file__).parents[3] / "shared" / "data"))

    def folder(name: str) -> Path:
        if not (root / name / "nodes.parquet").exists():
            pytest.skip(f"data set {name} is not in {root} (set TALK_DIST_DATA)")
        return root / name

    return folder
