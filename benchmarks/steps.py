"""What a step of the kernel costs on a real graph: both architectures, all rows or some of them, in turn in one run.

    python benchmarks/steps.py PREPARED --out benchmarks/results/steps.md

A step is `loss_and_grads`: kernel blocks against M = 1 % synthetic nodes and their gradients. Beside it the time of
its two matrix products (kernel block, and the gradient through it) at the speed of a large product in the same run.
One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import rig
import torch
from limits import product_rate

from talk_dist import LocalPool, PreparedTag, TextEncoder, preset
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.boundary import LossSpec
from talk_dist.synthetic.init import class_counts, one_hot_labels

ROWS = (0, 4096, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--cache", default="", help="folder of kept encodings")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tag, config = PreparedTag(arguments.data), preset()
    encoder, runtime = TextEncoder(config.encoder), RuntimeConfig(threads=1, cache_folder=arguments.cache)
    labels = one_hot_labels(class_counts(tag, config))
    train, m, width = tag.meta["split_sizes"]["train"], len(labels), encoder.width
    h_s, dual = torch.randn(m, width).numpy(), torch.randn(labels.shape).double().numpy()
    pools, norms = {}, {}
    for kind in ("gcn", "sgc"):
        kernel = dataclasses.replace(config.kernel, architecture=kind)
        pools[kind] = LocalPool(tag, encoder, kernel, runtime)
        pools[kind].encode(encoder.adapters())
        norms[kind] = pools[kind].meter.take()["propagate"]
    rate = 0.0
    seconds: dict[tuple[str, int], list[float]] = {(kind, rows): [] for kind in pools for rows in ROWS}
    for turn in range(arguments.repeats + 1):  # the first is to warm up: it plans the chunks
        rate = max(rate, product_rate())
        for (kind, rows), found in seconds.items():
            folds = max(1, round(train / rows)) if rows else 1
            loss = LossSpec("mse", fold=(turn % folds, folds))
            pools[kind].loss_and_grads(h_s, dual, loss)  # plans this fold
            started = time.perf_counter()
            taken = pools[kind].loss_and_grads(h_s, dual, loss).num_rows
            found.append((time.perf_counter() - started) * (train if not rows else train / folds) / taken)
    base = statistics.median(seconds["gcn", 0][1:])
    table = []
    for (kind, rows), found in seconds.items():
        ratio = sorted(value / base for value in found[1:])
        products = 4 * min(rows or train, train) * m * width / rate
        share = f"{products / statistics.median(found[1:]):.2f}"
        spread = [f"{ratio[place]:.3f}" for place in (len(ratio) // 2, 0, -1)]
        table.append([f"{kind}, {f'{rows:,}' if rows else 'all'} rows", *spread, share])
    rig.report(
        arguments.out,
        f"A step of the kernel on {tag.meta['name']}: {train:,} training rows × {m:,} synthetic nodes",
        [
            "Seconds relative to the median of the first row; the rows take turns. Last column: the two products of "
            "training rows with synthetic nodes, at the speed of a large product in this run, as a share of the step.",
            rig.table(["kernel", "median", "fastest", "slowest", "products"], table),
            f"Propagation and norms, once an encoding: sgc takes {norms['sgc'] / norms['gcn']:.2f} of gcn's time.",
        ],
        f"python benchmarks/steps.py {Path(arguments.data).name} --out benchmarks/results/steps.md",
    )


if __name__ == "__main__":
    main()
