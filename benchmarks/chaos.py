"""Processes are killed at random while a real graph is distilled: is the result that of an undisturbed local run?

    python benchmarks/chaos.py DATA/cora_cane --kills 20 --out benchmarks/results/chaos.md
    python benchmarks/chaos.py DATA/cora_cane --kills 0 --nodes 3 --whole --out benchmarks/results/three-nodes.md

Distils once in one process, then with `--runtime.kind ray` on simulated nodes of this machine (a scheduler and an
object store each), while random actors, and now and then the driver, get a SIGKILL at random times. A driver that was
killed is started again with the same command. At the end the two synthetic.safetensors are compared byte by byte.
``--whole``: the preset and two outer epochs, frozen encoder, 128 tokens a text; else a lighter run with adapters, which
encodes the real texts in every epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import rig

from talk_dist import open_tables, prepare

LIGHT = "--encoder.adapters true --synthetic.init medoid --inner.passes 8 --outer.steps 4 --outer.patience 99"
DRIVER_SHARE = 0.2  # of the kills
REST = (1.0, 8.0)  # seconds between two looks


@dataclass(eq=False)  # a thread is known by itself
class Killer(threading.Thread):
    """Kills so often, spread over the epochs: no epoch more than its share. The log says when, whom, and doing what."""

    kills: int
    epochs: int
    seed: int
    out: Path
    driver: subprocess.Popen[bytes] | None = None
    log: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.rng, self.began = random.Random(self.seed), time.monotonic()

    def run(self) -> None:
        while len(self.log) < self.kills:
            time.sleep(self.rng.uniform(*REST))
            if len(self.log) >= self.kills / self.epochs * (len(rig.records(self.out)) + 1):
                continue
            driver, victims = self.driver, sorted(rig.workers())
            if driver is None or driver.poll() is not None or not victims:
                continue
            if self.rng.random() < DRIVER_SHARE:
                self._kill(driver.pid, "driver")
                while set(rig.workers()) & set(victims):  # Ray ends the actors of a driver that has gone
                    time.sleep(0.2)
            else:
                self._kill(self.rng.choice(victims), "actor")

    def _kill(self, pid: int, who: str) -> None:
        try:
            doing = (
                psutil.Process(pid).cmdline()[0].removeprefix("ray::ShardActor").strip(".") if who == "actor" else ""
            )
            os.kill(pid, signal.SIGKILL)
        except (psutil.Error, ProcessLookupError):  # it has just ended by itself
            return
        epochs = len(rig.records(self.out))
        when = f"{time.monotonic() - self.began:.1f}"
        self.log.append([str(len(self.log) + 1), when, who, doing or "–", str(epochs)])
        print("kill", *self.log[-1], f"pid {pid}", flush=True)


def disturbed(command: list[str], killer: Killer) -> int:
    """Run the command until it ends by itself; how often it was started."""
    killer.start()
    for starts in range(1, 1000):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as driver:
            killer.driver = driver
            text = driver.communicate()[0].decode()
        if driver.returncode == 0:
            return starts
        if driver.returncode != -signal.SIGKILL:
            raise SystemExit(text)
    raise AssertionError("unreachable")


def nodes_used(seen: dict[int, int]) -> None:
    """Add the parent of every actor that lives now: the scheduler of its node."""
    for pid in rig.workers():
        try:
            seen[pid] = psutil.Process(pid).ppid()
        except psutil.Error:
            continue


def differences(local: Path, ray: Path) -> list[str]:
    """What is different between the results, bytes and history."""
    found = []
    if artifact(local) != artifact(ray):
        found.append("synthetic.safetensors")
    for name in ("val_accuracy", "krr_val_accuracy", "inner_loss", "loss"):
        mine, theirs = ([record.get(name) for record in rig.records(out)] for out in (local, ray))
        if mine != theirs:
            found.append(f"the log's {name}")
    return found


def artifact(out: Path) -> bytes:
    return (out / "synthetic" / "synthetic.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--actors", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments, more = parser.parse_known_args()
    options = ["--outer.epochs", "2"] if arguments.whole else [*LIGHT.split(), "--outer.epochs", str(arguments.epochs)]
    options += ["--runtime.cache", "false", "--cluster.attempts", "10", *more]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = open_tables(arguments.data / "nodes.parquet", arguments.data / "edges.parquet")
        length = 128 if arguments.whole else 16
        tag = prepare(source, f"{scratch}/prepared", max_tokens=length, parts=arguments.parts, name=arguments.data.name)
        began = time.monotonic()
        rig.distill(tag.path, scratch / "local", options)
        alone, began = time.monotonic() - began, time.monotonic()
        print(f"local run: {alone:.0f} s", flush=True)
        killer, seen, over = (
            Killer(arguments.kills, arguments.epochs, arguments.seed, scratch / "ray"),
            dict[int, int](),
            threading.Event(),
        )

        def look() -> None:
            while not over.wait(1.0):
                nodes_used(seen)

        with rig.started(arguments.nodes, cpus=4) as cluster:
            watcher = threading.Thread(target=look)
            watcher.start()
            command = rig.distill_command(tag.path, scratch / "ray", options + rig.on_ray(cluster, arguments.actors))
            try:
                starts = disturbed(command, killer)
            finally:
                over.set()
                watcher.join()
        took = time.monotonic() - began
        wrong = differences(scratch / "local", scratch / "ray")
        facts: dict[str, Any] = {
            "graph": f"{arguments.data.name}, {tag.num_nodes:,} nodes, {length} tokens a text, {arguments.parts} parts",
            "kills delivered": f"{len(killer.log)}, of the driver {sum(row[2] == 'driver' for row in killer.log)}",
            "actors": f"{arguments.actors} at a time; {len(seen)} processes on {len(set(seen.values()))} nodes in all",
            "driver started": f"{starts} time{'s' if starts > 1 else ''}",
            "epochs": len(rig.records(scratch / "ray")),
            "seconds, local and on Ray": f"{alone:.0f} and {took:.0f}",
            "sha256 of synthetic.safetensors, local": hashlib.sha256(artifact(scratch / "local")).hexdigest(),
            "the same on Ray": hashlib.sha256(artifact(scratch / "ray")).hexdigest(),
            "differences": ", ".join(wrong) or "none: file and log (losses, accuracies of every epoch) are equal",
        }
    blocks = [rig.table(["", " "], [[key, value] for key, value in facts.items()])]
    if killer.log:
        blocks.append(
            "Every kill is a SIGKILL. `doing`: the method in the title of the actor's process (–: none, or the driver)."
            f" `epochs`: finished by then. Random times, {REST[0]:.0f} s apart or more, at most an epoch's share of "
            f"them in each epoch; seed {arguments.seed}."
        )
        blocks.append(rig.table(["kill", "second", "who", "doing", "epochs"], killer.log))
    flags = f"--kills {arguments.kills} --seed {arguments.seed} --nodes {arguments.nodes} --actors {arguments.actors}"
    flags += (" --whole" if arguments.whole else f" --epochs {arguments.epochs}") + "".join(f" {word}" for word in more)
    title = f"{len(killer.log)} kills during one distillation" if killer.log else "One distillation on simulated nodes"
    command_line = f"python benchmarks/chaos.py DATA/{arguments.data.name} {flags}"
    blocks.append(f"Settings: `{' '.join(options)}`")
    rig.report(arguments.out, title, blocks, command_line)
    if wrong or len(killer.log) < arguments.kills:
        raise SystemExit(f"different: {wrong}; {len(killer.log)} of {arguments.kills} kills")


if __name__ == "__main__":
    main()
