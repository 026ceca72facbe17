"""Time until a student validates as well as the paper's schedule lets it at best: default against paper preset; and a
whole distillation against one joint training of encoder and student on everything.

    python benchmarks/time_to_accuracy.py PREPARED --epochs 6 --out benchmarks/results/time.md

Each in a process of its own, one thread, nothing cached; CPU seconds of that process since the encoder was loaded, so
that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import rig
import torch

from talk_dist import EvaluateConfig, LocalPool, PreparedTag, TextEncoder, distill, preset
from talk_dist.models.gnn import Student
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.callbacks import Callback
from talk_dist.runtime.full import WholeGraph, fit_full
from talk_dist.runtime.outer import student_accuracy

RUNTIME = RuntimeConfig(threads=1, cache=False)
Found = list[tuple[float, float]]  # CPU seconds, validation accuracy


class Stopwatch(Callback):
    """Validation accuracies and when they were known."""

    def __init__(self) -> None:
        self.found: Found = []
        self.began = time.process_time()

    def epoch(self, record: dict[str, Any]) -> None:
        self.found.append((time.process_time() - self.began, record["val_accuracy"]))
        print(self.found[-1], file=sys.stderr, flush=True)


def distilled(path: str, name: str, epochs: int) -> Found:
    config = replace(preset(name), runtime=RUNTIME)
    if epochs:
        config = replace(config, outer=replace(config.outer, epochs=epochs, patience=epochs))
    tag, encoder = PreparedTag(path), TextEncoder(config.encoder)
    torch.set_num_threads(1)
    watch = Stopwatch()
    distill(LocalPool(tag, encoder, config.kernel, RUNTIME), encoder, config, [watch])
    watch.epoch({"val_accuracy": watch.found[-1][1]})  # with what comes after the last epoch
    return watch.found


def joint(path: str, epochs: int) -> Found:
    """Adapters and a GCN on all training nodes, as `evaluate` trains its reference."""
    torch.set_num_threads(1)
    config, recipe = preset(), EvaluateConfig().recipe
    tag, encoder = PreparedTag(path), TextEncoder(replace(config.encoder, adapters=True))
    watch, pool = Stopwatch(), LocalPool(tag, encoder, config.kernel, RUNTIME)
    pool.encode(encoder.adapters())
    student = Student(config.student, encoder.width, len(tag.classes), 0)
    told = pool.student_scores

    def heard(*asked: Any) -> Any:  # of every validation
        counts = told(*asked)
        watch.epoch({"val_accuracy": float(counts.trace() / counts.sum())})
        return counts

    pool.student_scores = heard  # type: ignore[method-assign, assignment]
    fit_full(encoder, student, pool, WholeGraph(tag), recipe, epochs, seed=0)
    pool.encode(encoder.adapters())  # with those that were kept
    assert student_accuracy(pool, student, "val") >= max(value for _, value in watch.found) - 1e-9
    return watch.found[:-1]  # but for that look


def first(found: Found, accuracy: float) -> float | None:
    return next((seconds for seconds, value in found if value >= accuracy), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=6, help="outer epochs of the paper's schedule")
    parser.add_argument("--joint", type=int, default=4, help="epochs of joint training")
    parser.add_argument(
        "--what", nargs="+", choices=("default", "joint", "paper"), default=["default", "joint", "paper"]
    )
    parser.add_argument("--child", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.child == "joint":
            print(json.dumps(joint(arguments.data, arguments.joint)))
        else:
            epochs = arguments.epochs if arguments.child == "paper" else 0
            print(json.dumps(distilled(arguments.data, arguments.child, epochs)))
        return
    found: dict[str, Found] = {}
    for name in arguments.what:
        words = [sys.executable, __file__, arguments.data, "--child", name, "--epochs", str(arguments.epochs)]
        print(name, file=sys.stderr, flush=True)
        done = subprocess.run([*words, "--joint", str(arguments.joint)], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]
    told = {name: pairs[-arguments.joint :] if name == "joint" else pairs for name, pairs in found.items()}
    rows = [[name, *(f"{s:.0f} s: {v:.4f}" for s, v in pairs)] for name, pairs in told.items()]
    width = max(map(len, rows))
    lines = [rig.table(["", *map(str, range(width - 1))], [row + [""] * (width - len(row)) for row in rows])]
    whole = found["default"][-1][0] if "default" in found else None
    if whole and "paper" in found:
        goal = max(value for _, value in found["paper"])
        theirs, ours = next(at for at, value in found["paper"] if value == goal), first(found["default"], goal)
        lines.append(
            f"The paper's schedule validates at best at {goal:.4f}, after {theirs:.0f} s; the default "
            + (f"validates so after {ours:.0f} s: {theirs / ours:.0f} times sooner." if ours else "does not.")
        )
    if whole and "joint" in found:
        frozen, trained = found["joint"][: -arguments.joint], found["joint"][-arguments.joint :]
        lines.append(f"A whole distillation takes {whole:.0f} s and validates at {found['default'][-1][1]:.4f}.")
        parts = {"with the encoder as it is, which comes first": frozen, "of both together": trained}
        for what, pairs in parts.items():
            (best_at, best), over = max(pairs, key=lambda pair: (pair[1], -pair[0])), pairs[-1][0]
            lines.append(
                f"Training on everything, {what}, validates at best at {best:.4f} after {best_at:.0f} s and is over "
                f"after {over:.0f} s: the distillation takes {whole / best_at:.2f} and {whole / over:.2f} of that."
            )
    name = PreparedTag(arguments.data).meta["name"]
    command = f"python benchmarks/time_to_accuracy.py {Path(arguments.data).name} --epochs {arguments.epochs}"
    command += f" --joint {arguments.joint} --what {' '.join(arguments.what)}"
    rig.report(
        arguments.out, f"Time to accuracy: {name}, CPU seconds and validation accuracy of every epoch", lines, command
    )


if __name__ == "__main__":
    main()
