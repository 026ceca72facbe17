"""How near each stage comes to what this machine could do, and whether a commit made one slower.

    python benchmarks/limits.py PREPARED --out benchmarks/results/limits.md
    python benchmarks/limits.py PREPARED --compare REV

Ceilings, measured in between: products of large float32 matrices, FLOP/s, and copies of arrays beyond the caches,
bytes/s. A stage's bound is its useful products at that rate (no padding counted, each once, whatever the code repeats)
plus one pass over memory for every element-wise stage that cannot be left out; the table has bound / seconds. With
`--compare` this very script runs against the packages of both commits, in turn. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rig
import torch

from talk_dist import LocalPool, PreparedTag, TextEncoder, preset
from talk_dist.config import InnerConfig
from talk_dist.data.tokenizer import load_tokenizer
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings
from talk_dist.models.shape import ModelShape
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.outer import Objective, student_accuracy
from talk_dist.synthetic.init import class_counts, one_hot_labels

TEXTS = 256  # encoded in one turn


def product_rate(size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a product of square matrices, the fastest of some."""
    a = torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(8))


def copy_rate(mib: int = 256) -> float:
    """Bytes/s, read and written, of a copy beyond the caches, the fastest of some."""
    a = torch.zeros(mib << 18)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a)) for _ in range(5))


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class Stage:
    """An action, its useful FLOP in products, and the bytes that its element-wise stages cannot avoid."""

    name: str
    action: Callable[[], object]
    flop: float
    bytes: float = 0.0


def stages(path: str, cache: str) -> list[Stage]:
    tag, config = PreparedTag(path), preset()
    encoder, runtime = TextEncoder(config.encoder), RuntimeConfig(threads=1, cache_folder=cache)
    config = dataclasses.replace(config, outer=dataclasses.replace(config.outer, rows=0, targets="labels"))
    pool = LocalPool(tag, encoder, config.kernel, runtime)
    pool.encode(encoder.adapters())
    labels = one_hot_labels(class_counts(tag, config))
    rng, shape = torch.Generator().manual_seed(0), ModelShape.of(encoder.model.config)
    m, d, t, classes, hidden = len(labels), encoder.width, config.synthetic.tokens, labels.shape[1], 256
    h_s, objective = torch.randn(m, d, generator=rng), Objective(pool, config)
    x_s, rows = 0.05 * torch.randn(m, t, d, generator=rng), tag.meta["split_sizes"]["train"]
    texts = tag.partition(0).tokens
    some = texts.take(np.random.default_rng(0).permutation(len(texts))[:TEXTS])
    student, recipe = Student(config.student, d, classes, 0), InnerConfig(passes=20, patience=20, target_loss=1e-9)
    nodes, entries = tag.num_nodes, 2 * tag.meta["num_edges"] + tag.num_nodes
    tokenizer, lists = load_tokenizer(config.encoder.name), [["a text of some twenty words " * 4] * 512][0]
    encode = sum(shape.token_flop(len(some[i])) * len(some[i]) for i in range(len(some)))
    token = m * t * shape.token_flop(t)
    return [
        Stage(
            "outer step without the encoder: kernel, gradient, solve",
            lambda: objective(h_s, labels, 0.0),
            4.0 * rows * m * d + 6.0 * rows * m * classes,
            20.0 * rows * m,  # read the correlation, write value and slope; read slope and gradient
        ),
        Stage(f"encoding of {TEXTS} texts", lambda: encoder.encode_tokens(some), encode),
        Stage("injection: encode the synthetic nodes, again with gradient", lambda: inject(encoder, x_s), 3 * token),
        Stage("a residual of stage two: encode with gradient", lambda: encoder.residual(x_s, h_s), 2 * token),
        Stage(
            "20 inner passes of a student",
            lambda: fit_encodings(student, h_s, labels, recipe, seed=0),
            20 * 4.0 * m * hidden * d + 20 * 6.0 * m * hidden * classes,
        ),
        Stage(
            "validation of a student on the graph",
            lambda: student_accuracy(pool, student, "val"),
            2.0 * nodes * hidden * (d + classes) + 2.0 * entries * (hidden + classes),
            8.0 * nodes * hidden,
        ),
        Stage("tokenising 512 texts", lambda: tokenizer.encode(lists, 128), 0.0),
    ]


def inject(encoder: TextEncoder, x_s: torch.Tensor) -> None:
    encoder.inject(x_s, encoder.encode_embeds(x_s))


def measured(path: str, cache: str, turns: int) -> dict[str, list[float]]:
    """Seconds of every stage and its bound, turn by turn: the ceilings are measured in each."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    work = stages(path, cache)
    for stage in work:
        stage.action()  # to warm up
    for _ in range(turns):
        rate, copies = product_rate(), copy_rate()
        found.setdefault("GFLOP/s", []).append(rate / 1e9)
        found.setdefault("bfloat16 GFLOP/s", []).append(product_rate(dtype=torch.bfloat16) / 1e9)
        found.setdefault("GB/s", []).append(copies / 1e9)
        for stage in work:
            found.setdefault(f"seconds {stage.name}", []).append(seconds(stage.action))
            found.setdefault(f"bound {stage.name}", []).append(stage.flop / rate + stage.bytes / copies)
    return found


def elsewhere(packages: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """One turn in a process of its own, with the packages in this folder."""
    words = [sys.executable, str(Path(__file__).resolve()), arguments.data, "--json", "--turns", "1"]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(
        [*words, "--cache", arguments.cache], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{packages}: {done.stderr}")
    result: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def compared(arguments: argparse.Namespace) -> str:
    """Seconds of this tree relative to those of another commit, processes taking turns."""
    here, pairs = Path(__file__).resolve().parents[1], []
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "there"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", str(there), arguments.compare], cwd=here, check=True
        )
        try:
            for _ in range(arguments.turns):
                pairs.append((elsewhere(here, arguments), elsewhere(there, arguments)))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(there)], cwd=here, check=True)
    rows = []
    for name in (key for key in pairs[0][0] if key.startswith("seconds ")):
        ratios = sorted(now[name][0] / before[name][0] for now, before in pairs)
        rows.append(
            [
                name.removeprefix("seconds "),
                *(f"{r:.2f}" for r in (statistics.median(ratios), *ratios[:: len(ratios) - 1 or 1])),
            ]
        )
    return rig.table([f"seconds relative to {arguments.compare}", "median", "least", "most"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--cache", default="", help="folder of kept encodings")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--compare", default="", help="a commit to compare with")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    command = f"python benchmarks/limits.py {Path(arguments.data).name}"
    if arguments.compare:
        rig.report(
            arguments.out,
            f"Against {arguments.compare}",
            [compared(arguments)],
            f"{command} --compare {arguments.compare}",
        )
        return
    found = measured(arguments.data, arguments.cache, arguments.turns)
    if arguments.json:
        print(json.dumps(found))
        return
    rows = []
    for name in (key.removeprefix("seconds ") for key in found if key.startswith("seconds ")):
        took, bound = found[f"seconds {name}"], found[f"bound {name}"]
        shares = sorted(b / s for b, s in zip(bound, took, strict=True))
        shown = (
            [f"{share:.2f}" for share in (statistics.median(shares), shares[0], shares[-1])]
            if any(bound)
            else ["–"] * 3
        )
        rows.append([name, f"{statistics.median(took):.3g}", *shown])
    ceilings = ", ".join(
        f"{statistics.median(found[name]):.0f} {name} ({min(found[name]):.0f} to {max(found[name]):.0f})"
        for name in ("GFLOP/s", "bfloat16 GFLOP/s", "GB/s")
    )
    rig.report(
        arguments.out,
        f"How near to the machine's limits: {PreparedTag(arguments.data).meta['name']}",
        [
            f"Ceilings: {ceilings}.",
            rig.table(["stage", "seconds", "share of the bound", "least", "most"], rows),
        ],
        f"{command} --out benchmarks/results/limits.md",
    )


if __name__ == "__main__":
    main()
