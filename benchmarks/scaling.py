"""Cost against the number of nodes N, from ten thousand to ten million on one machine: seconds and memory by phase.

    python benchmarks/scaling.py SCRATCH --out docs/scaling

Graphs of benchmarks/powerlaw.py, ten edges a node, encodings of width 128 given, M = 1 % of N. For every N: generate,
prepare, load, propagate, start from class centres, ten outer steps, a student and its validation on all nodes. Each
size runs in a process of its own, with encodings on disk (`kernel.fields: disk`). Anonymous memory is what a process
cannot give back; resident memory counts what it has mapped from disk too. Writes OUT.json and OUT.png, prints a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rig
import torch
from powerlaw import PowerLaw, write

from talk_dist import LocalPool, PreparedTag, open_tables, prepare, preset
from talk_dist.models.encoder import load_encoder
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings
from talk_dist.page import png
from talk_dist.runtime.outer import Objective, accuracy, student_accuracy
from talk_dist.synthetic.coresets import class_centres, sample_for
from talk_dist.synthetic.init import class_counts, one_hot_labels

STEPS, EDGES, WIDTH = 10, 10, 128


class Watch:
    """Seconds, and peaks of anonymous and resident bytes, of each phase of this process."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        peaks, over = {"anonymous": 0, "resident": 0}, threading.Event()

        def look() -> None:
            while True:
                for line in Path("/proc/self/status").read_text().splitlines():
                    kind = {"RssAnon": "anonymous", "VmRSS": "resident"}.get(line.split(":")[0])
                    if kind:
                        peaks[kind] = max(peaks[kind], int(line.split()[1]) << 10)
                if over.wait(0.1):
                    return

        thread, started = threading.Thread(target=look), time.perf_counter()
        thread.start()
        yield
        took = time.perf_counter() - started
        over.set()
        thread.join()
        self.phases[name] = {"seconds": took, **peaks}
        print(f"  {name:10} {took:8.1f} s, {peaks['anonymous'] / 2**30:5.2f} GiB", file=sys.stderr, flush=True)


def measured(nodes: int, scratch: Path, threads: int) -> dict[str, Any]:
    """All phases for a graph of ``nodes`` nodes."""
    torch.set_num_threads(threads)
    tables, prepared, watch = scratch / "tables", scratch / "prepared", Watch()
    with watch.phase("generate"):
        write(PowerLaw(nodes, EDGES * nodes, width=WIDTH), tables)
    with watch.phase("prepare"):
        source = open_tables(tables / "nodes.parquet", tables / "edges.parquet")
        tag = prepare(source, str(prepared), name=f"power law, {nodes:,} nodes")
    shutil.rmtree(tables)
    base = preset()
    config = replace(
        base,
        encoder=replace(base.encoder, name=f"given:{WIDTH}"),
        kernel=replace(base.kernel, fields="disk"),
        synthetic=replace(base.synthetic, tokens=1),
        outer=replace(base.outer, targets="labels"),
        runtime=replace(base.runtime, threads=threads, scratch=str(scratch)),
    )
    encoder = load_encoder(config.encoder)
    with watch.phase("load"):
        pool = LocalPool(PreparedTag(tag.path), encoder, config.kernel, config.runtime)
    with watch.phase("propagate"):
        pool.encode(encoder.adapters())
    counts = class_counts(tag, config)
    y_s, objective = one_hot_labels(counts), Objective(pool, config)
    with watch.phase("start"):
        blocks = config.kernel.blocks(len(y_s))
        h_s = torch.from_numpy(class_centres(sample_for(pool, counts, 0), counts, 0, blocks))
    before = accuracy(objective.krr_counts(h_s, y_s, "val"))
    leaf = h_s.clone().requires_grad_()
    rate = config.two_stage.feature_lr * float(h_s.square().mean().sqrt())
    optimizer, seconds = torch.optim.Adam([leaf], lr=rate), []
    pool.meter.take()
    with watch.phase("steps"):
        for step in range(STEPS):
            started = time.perf_counter()
            leaf.grad = objective(leaf.detach(), y_s, Objective.initial_log_temperature, step).d_hs.to(leaf)
            optimizer.step()
            seconds.append(time.perf_counter() - started)
    meter, h_s = pool.meter.take(), leaf.detach()
    with watch.phase("student"):
        student = Student(config.student, WIDTH, y_s.shape[1], 0)
        fit_encodings(student, h_s, y_s, config.inner, seed=0)
    with watch.phase("validate"):
        validated = student_accuracy(pool, student, "val")
    meta = tag.meta
    return {
        "nodes": nodes,
        "edges": meta["num_edges"],
        "synthetic": len(y_s),
        "blocks": blocks,
        "rows": meta["split_sizes"]["train"] / objective.folds(len(y_s)),
        "phases": watch.phases,
        "steps": seconds,
        "meter": meter,
        "krr before": before,
        "krr after": accuracy(objective.krr_counts(h_s, y_s, "val")),
        "student": validated,
    }


def draw(figure: Any, found: list[dict[str, Any]]) -> None:
    """Seconds and anonymous memory of each phase against N."""
    left, right = figure.subplots(1, 2)
    sizes = np.array([one["nodes"] for one in found], float)
    for name in found[0]["phases"]:
        left.plot(sizes, [one["phases"][name]["seconds"] for one in found], marker="o", label=name)
        right.plot(sizes, [one["phases"][name]["anonymous"] / 2**30 for one in found], marker="o", label=name)
    left.plot(sizes, 1e-5 * sizes, "--", color="grey", label="linear")
    for axes, what in ((left, "seconds"), (right, "anonymous memory, GiB (peak)")):
        axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel=what)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", type=int, default=0, help="this size alone, as JSON")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.scratch, arguments.threads)))
        return
    found = []
    for nodes in arguments.nodes:
        folder = arguments.scratch / str(nodes)
        folder.mkdir(parents=True)
        words = [sys.executable, __file__, str(folder), "--one", str(nodes), "--threads", str(arguments.threads)]
        print(f"{nodes:,} nodes", file=sys.stderr, flush=True)
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        shutil.rmtree(folder)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        if arguments.out:
            arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    if arguments.out:
        arguments.out.with_suffix(".png").write_bytes(png(lambda figure: draw(figure, found), 9, 4))
    print(table(found))


def table(found: list[dict[str, Any]]) -> str:
    """A column for each size; of the largest, seconds over what the line through the two before it foretells."""
    last = [""] if len(found) < 3 else ["measured / foretold"]
    lines = [["", *(f"N = {one['nodes']:,}" for one in found), *last]]
    for name in found[0]["phases"]:
        took = [one["phases"][name]["seconds"] for one in found]
        lines.append([f"{name}, s", *(f"{seconds:.2f}" for seconds in took), *foretold(found, took)])
    total = [sum(phase["seconds"] for phase in one["phases"].values()) for one in found]
    lines.append(["all of it, s", *(f"{seconds:.1f}" for seconds in total), *foretold(found, total)])
    for kind in ("anonymous", "resident"):
        peaks = [max(phase[kind] for phase in one["phases"].values()) / 2**30 for one in found]
        lines.append([f"peak {kind} memory, GiB", *(f"{peak:.2f}" for peak in peaks), *([""] if last else [])])
    for name in ("synthetic", "blocks", "rows", "krr before", "krr after", "student"):
        shown = [f"{one[name]:,.3f}".removesuffix(".000") for one in found]
        lines.append([name, *shown, *([""] if last else [])])
    return rig.table(lines[0], lines[1:])


def foretold(found: list[dict[str, Any]], values: list[float]) -> list[str]:
    if len(found) < 3:
        return [""]
    (n1, n2, n3), (v1, v2, v3) = (one["nodes"] for one in found[-3:]), values[-3:]
    return [f"{v3 / (v2 + (v2 - v1) / (n2 - n1) * (n3 - n2)):.2f}"]


if __name__ == "__main__":
    main()
