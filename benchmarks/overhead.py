"""What Ray costs a kernel-bound step, and what a second actor brings: ratios from one run, the pools in turn.

    python benchmarks/overhead.py --out benchmarks/results/overhead.md

A step is `loss_and_grads` of the pool: broadcast, kernel blocks and their gradients, sums. The graph is a ring where
every node is tied to its four nearest, with random ties besides; texts are random words; a random encoder of MiniLM's
width encodes them. One thread a process throughout.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import rig

from cluster.placement import allot
from cluster.pool import RayPool
from talk_dist import LocalPool, PreparedTag, TextEncoder, prepare
from talk_dist.config import EncoderConfig, KernelConfig
from talk_dist.data.tables import from_arrow
from talk_dist.resources import ClusterConfig, RuntimeConfig
from talk_dist.runtime.boundary import LossSpec
from talk_dist.runtime.pool import ShardPool

WORDS = ("graph", "node", "edge", "text", "kernel", "ridge", "label", "token", "shard", "halo", "degree", "hub")
CLASSES, WIDTH = 8, 384
RUNTIME = RuntimeConfig(threads=1, cache=False)


def graph(nodes: int, train: int, seed: int) -> tuple[pa.Table, pa.Table]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(words) for words in rng.choice(WORDS, (nodes, 6))]
    split = np.full(nodes, "test", dtype=object)
    split[rng.permutation(nodes)] = (
        ["train"] * train + ["val"] * ((nodes - train) // 2) + ["test"] * (nodes - train - (nodes - train) // 2)
    )
    near = np.concatenate([np.stack([np.arange(nodes), (np.arange(nodes) + step) % nodes], 1) for step in (1, 2)])
    ends = np.concatenate([near, rng.integers(0, nodes, (nodes // 20, 2))])
    table = {"node_id": np.arange(nodes), "text": texts, "label": rng.integers(0, CLASSES, nodes), "split": split}
    return pa.table(table), pa.table({"src": ends[:, 0], "dst": ends[:, 1]})


def ray_pool(tag: PreparedTag, encoder: EncoderConfig, actors: int) -> RayPool:
    settings = ClusterConfig(actors=actors)
    allotment = allot(tag.num_parts, [{"CPU": 8}], RUNTIME, settings, lambda parts: 1 << 30)
    return RayPool(tag, encoder, KernelConfig(), RUNTIME, settings, allotment)


def in_turn(pools: dict[str, ShardPool], m: int, repeats: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds of every step after one to warm up, and whether all pools gave the same gradient to the bit."""
    rng = np.random.default_rng(1)
    h_s = rng.normal(size=(m, WIDTH)).astype(np.float32)
    dual = rng.normal(size=(m, CLASSES))
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    gradients: dict[str, np.ndarray] = {}
    for turn in range(repeats + 1):
        for name in list(pools)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            gradients[name] = pools[name].loss_and_grads(h_s, dual, LossSpec("mse")).d_hs
            seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    first, *others = gradients.values()
    return {name: took[1:] for name, took in seconds.items()}, all(np.array_equal(first, g) for g in others)


def compare(pools: dict[str, ShardPool], m: int, repeats: int) -> tuple[list[list[str]], bool]:
    """Rows of the table: the first pool is the measure of the others."""
    for pool in pools.values():
        pool.encode({})
    seconds, same = in_turn(pools, m, repeats)
    base = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, took in seconds.items():
        spread = [value / base for value in (statistics.median(took), min(took), max(took))]
        rows.append([name, str(len(took)), *(f"{value:.3f}" for value in spread)])
    return rows, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=83_000)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, rig.started():
        name = rig.small_encoder(f"{scratch}/encoder")
        config = EncoderConfig(name=name, pooling="mean", device="cpu")

        def prepared(parts: int) -> PreparedTag:
            source = from_arrow(*graph(arguments.nodes, arguments.train, arguments.seed))
            return prepare(source, f"{scratch}/{parts}", encoder=name, max_tokens=16, parts=parts)

        def measured(make: Callable[[], dict[str, ShardPool]]) -> tuple[str, bool]:
            pools = make()
            rows, same = compare(pools, arguments.size, arguments.repeats)
            for pool in pools.values():
                if isinstance(pool, RayPool):
                    pool.close()
            head = ["pool", "steps", "median", "fastest", "slowest"]
            return rig.table(head, rows), same

        one, two = prepared(1), prepared(2)
        overhead, same_one = measured(
            lambda: {
                "LocalPool, 1 part": LocalPool(one, TextEncoder(config), KernelConfig(), RUNTIME),
                "RayPool, 1 part, 1 actor": ray_pool(one, config, 1),
            }
        )
        scaling, same_two = measured(
            lambda: {
                "RayPool, 2 parts, 1 actor": ray_pool(two, config, 1),
                "RayPool, 2 parts, 2 actors": ray_pool(two, config, 2),
            }
        )
    words = f"{arguments.train:,} training rows of {arguments.nodes:,} nodes × {arguments.size:,} synthetic nodes"
    rig.report(
        arguments.out,
        f"Overhead of Ray and gain of a second actor: a kernel step, {words}",
        [
            "Seconds of `loss_and_grads` relative to the median of the first row. The pools take turns, each first in "
            "every other turn, after one step each to warm up. One thread a process.",
            overhead,
            f"The gradients are {'equal' if same_one else 'NOT equal'} to the bit.",
            scaling,
            f"The gradients are {'equal' if same_two else 'NOT equal'} to the bit.",
            f"The graph is a ring, each node tied to its four nearest, and {arguments.nodes // 20:,} random edges; "
            f"six random words a text; a random encoder of one layer, width {WIDTH}; seed {arguments.seed}.",
        ],
        "python benchmarks/overhead.py --out benchmarks/results/overhead.md",
    )


if __name__ == "__main__":
    main()
