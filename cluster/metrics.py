"""A run's progress and its record of each epoch as gauges: Ray exports them, Prometheus collects, Grafana draws
(infra/grafana)."""

from __future__ import annotations

import threading
from typing import Any

from ray.util.metrics import Gauge

from talk_dist.runtime.callbacks import Callback

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "talk_dist_progress": ("Share of a stage that is done", ("stage",)),
    "talk_dist_epoch": ("Outer epochs finished", ()),
    "talk_dist_val_accuracy": ("Validation accuracy of the student", ()),
    "talk_dist_krr_val_accuracy": ("Validation accuracy of the kernel predictor", ()),
    "talk_dist_loss": ("Loss before the last outer step", ()),
    "talk_dist_step_seconds": (
        "Seconds by phase: kernel, solve and inject of a mean outer step; the others of the epoch",
        ("phase",),
    ),
    "talk_dist_bytes_moved": ("Bytes between processes since the start", ()),
    "talk_dist_restarts": ("Processes replaced since the start", ()),
    "talk_dist_host_bytes": ("Peak resident memory of a process", ("shard",)),
    "talk_dist_gpu_bytes": ("Peak GPU memory of a process", ("shard",)),
}


class Gauges(Callback):
    """What a run has told, as gauges that Ray exports as ``ray_NAME``, until they are closed.

    A thread sets them again and again: Ray forgets a gauge that was not set for twice its reporting interval, and what
    is told may be an hour old.
    """

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._gauges = {name: Gauge(name, description=words, tag_keys=tags) for name, (words, tags) in GAUGES.items()}
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._every, self._over = every_seconds, threading.Event()
        self._thread = threading.Thread(target=self._set, name="talk-dist-gauges", daemon=True)
        self._thread.start()

    def progress(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        self._told["talk_dist_progress", (("stage", stage),)] = done / max(1, total)

    def epoch(self, record: dict[str, Any]) -> None:
        self._told.update({(name, tuple(tags.items())): value for name, tags, value in samples(record)})

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _set(self) -> None:
        while not self._over.wait(self._every):
            for (name, tags), value in list(self._told.items()):
                self._gauges[name].set(value, tags=dict(tags))


def samples(record: dict[str, Any]) -> list[tuple[str, dict[str, str], float]]:
    """(gauge, tags, value) of an epoch's record."""
    found: list[tuple[str, dict[str, str], float]] = [
        ("talk_dist_epoch", {}, record["epoch"]),
        ("talk_dist_val_accuracy", {}, record["val_accuracy"]),
        ("talk_dist_krr_val_accuracy", {}, record["krr_val_accuracy"]),
        ("talk_dist_bytes_moved", {}, record["vitals"]["bytes_moved"]),
        ("talk_dist_restarts", {}, record["vitals"]["restarts"]),
    ]
    if record.get("loss"):
        found.append(("talk_dist_loss", {}, record["loss"][-1]))
    steps = record["seconds"].get("steps", [])
    for phase in sorted({phase for step in steps for phase in step}):
        mean = sum(step.get(phase, 0.0) for step in steps) / len(steps)
        found.append(("talk_dist_step_seconds", {"phase": phase}, mean))
    seen = {tags["phase"] for _, tags, _ in found if tags}
    for phase, value in record["seconds"].items():
        if phase not in {*seen, "steps", "epoch"}:
            found.append(("talk_dist_step_seconds", {"phase": phase}, value))
    for kind in ("host_bytes", "gpu_bytes"):
        found += [(f"talk_dist_{kind}", {"shard": shard}, value) for shard, value in record["vitals"][kind].items()]
    return found
