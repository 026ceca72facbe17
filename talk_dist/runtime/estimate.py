"""What the processes of a distillation will hold, from META.json and the configuration alone.

Arrays that live through a run are counted, not guessed (a test compares them with a real shard). Working memory is
a model of what was measured; `benchmarks/memory.py` compares the whole with the measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talk_dist.config import DistillConfig
from talk_dist.models.shape import ModelShape
from talk_dist.runtime.shard import LIVE_BUFFERS
from talk_dist.runtime.speed import STEP_SECONDS, Evaluation, work

BASE_BYTES = 365 << 20  # a process with torch, transformers and torch-geometric
DRIVER_BYTES = 150 << 20  # what the command line and scikit-learn add
RAY_BYTES = 40 << 20  # what a connection to Ray adds
DEEPSPEED_BYTES = 150 << 20  # what DeepSpeed and its process group add
HEAP = 1.5  # arrays of many sizes leave holes in the heap
REMEDIES = {
    "encode": "lower --encoder.batch_tokens",
    "inject": "lower --outer.inject_batch or --synthetic.tokens",
    "kernel": "lower --kernel.chunk_mib",
    "full": "leave `full` out of --evaluation.against",
}


@dataclass(frozen=True)
class Process:
    """Bytes of one process: what it holds throughout, and what each phase adds while it runs.

    With ``device`` the model and the phases live on a GPU, the rest in host memory.
    """

    base: int
    held: dict[str, int]
    model: int
    working: dict[str, int]
    device: bool = False

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.working, key=lambda name: self.working[name])

    @property
    def on_device(self) -> int:
        return self.model + self.working[self.largest] if self.device else 0

    @property
    def host(self) -> int:
        there = 0 if self.device else self.model + self.working[self.largest]
        return self.base + sum(self.held.values()) + there

    def refusal(self, who: str, available: int) -> str:
        """Why ``who`` cannot run in ``available`` bytes, and what to change."""
        held, phase = sum(self.held.values()), self.largest
        return (
            f"{who} needs about {gib(self.host)} and {gib(available)} are free: {gib(held)} for the graph and its "
            f"encodings, {gib(self.working[phase])} while it does its largest step ({phase}). To fit, "
            f"{REMEDIES[phase]}; take an encoder of smaller width; or use a machine with more memory"
        )


@dataclass(frozen=True)
class Plan:
    """Bytes and FLOP by what needs them."""

    nodes: int
    artifact_bytes: int
    shards: list[dict[str, int]]  # of each shard, by array: held from the first encoding to the end
    model: int  # the language model
    adapters: int
    driver_arrays: int  # token embeddings, their optimizer, K_ss and its like
    working: dict[str, int]  # of each phase, while it runs
    broadcast: int  # bytes of what a step sends to every shard
    flop: dict[str, float]
    steps: dict[str, int]  # training steps, each with a least duration
    device: bool

    def whole(self) -> Process:
        """The one process of a local run."""
        held = {"shards": sum(map(_total, self.shards)), "driver": self.driver_arrays}
        return Process(BASE_BYTES + DRIVER_BYTES, held, self.model, self.working, self.device)

    def actor(self, parts: Sequence[int]) -> Process:
        """A process that holds these parts, and an encoder of its own."""
        working = {name: self.working[name] for name in ("encode", "kernel")}
        held = {"shards": sum(_total(self.shards[part]) for part in parts)}
        return Process(BASE_BYTES + RAY_BYTES, held, self.model, working, self.device)

    def driver(self, group: bool) -> Process:
        """The driver of a run on a cluster; with a ``group`` the language model is not in it."""
        working = {"inject": 0 if group else self.working["inject"]}
        working |= {name: self.working[name] for name in ("full",) if name in self.working}
        held = {"driver": self.driver_arrays}
        return Process(
            BASE_BYTES + DRIVER_BYTES + RAY_BYTES, held, 0 if group else self.model, working, self.device and not group
        )

    def worker(self, workers: int, stage: int) -> Process:
        """One of the language model's workers under ZeRO ``stage``."""
        split = {"parameters": stage >= 3, "gradients": stage >= 2, "optimizer": stage >= 1}
        share = {name: 1 / workers if divided else 1.0 for name, divided in split.items()}
        model = self.model * share["parameters"]
        trained = self.adapters * (2 * share["optimizer"] + share["gradients"] + share["optimizer"])
        working = {"inject": self.working["inject"]}
        return Process(BASE_BYTES + RAY_BYTES + DEEPSPEED_BYTES, {}, int(model + trained), working, self.device)

    def object_store(self, actors: int) -> int:
        """Of the whole cluster: what a step broadcasts, to each node once, and halo rows on their way."""
        halo = sum(shard["halo"] for shard in self.shards)
        return self.broadcast * actors + halo

    def seconds(self, rate: float) -> dict[str, float]:
        """By phase, for a machine whose matrix product runs at ``rate`` FLOP/s."""
        return {name: flop / rate + self.steps.get(name, 0) * STEP_SECONDS for name, flop in self.flop.items()}


def plan(
    meta: dict[str, Any],
    config: DistillConfig,
    model: ModelShape,
    num_synthetic: int,
    evaluation: Evaluation | None,
    device: bool = False,
) -> Plan:
    """Of a prepared graph with this ``meta``; without ``evaluation`` of the distillation alone."""
    m, t, classes = num_synthetic, config.synthetic.tokens, len(meta["classes"])
    tokens_bytes = m * t * model.width * 4
    stored = {"float32": 4 * model.width, "bfloat16": 2 * model.width, "int8": model.width + 4}[
        config.synthetic.storage
    ]
    driver = 7 * tokens_bytes + 12 * m * m * 8 + 8 * m * model.width * 8  # Adam, gradient, best; K_ss and its like
    adapters = 3 * 2 * 4 * config.encoder.rank * model.width * model.layers if config.encoder.adapters else 0
    flop, steps = work(meta, config, model, m, evaluation)
    return Plan(
        nodes=m,
        artifact_bytes=m * t * stored + m * classes * 4,
        shards=[_shard(part, meta, config, model.width) for part in meta["parts"]],
        model=model.bytes,
        adapters=adapters,
        driver_arrays=driver,
        working=_working(meta, config, model, m, evaluation),
        broadcast=m * (4 * model.width + 8 * classes) + adapters,
        flop=flop,
        steps=steps,
        device=device,
    )


def _total(shard: dict[str, int]) -> int:
    return sum(size for name, size in shard.items() if name != "halo")  # halo: on its way, not held


def _shard(part: dict[str, Any], meta: dict[str, Any], config: DistillConfig, width: int) -> dict[str, int]:
    own, local, entries = part["nodes"], part["nodes"] + part["halo"], part["entries"]
    item = 8 if config.kernel.precision == "float64" else 4
    deeper = max(0, config.kernel.hops - 1)
    return {
        "tokens": 4 * part["tokens"] + 8 * (own + 1),
        "graph": 8 * entries + 8 * (local + 1) + 8 * local + 21 * part["halo"] + 29 * own,
        "propagation": 12 * entries + 4 * (local + 1),
        "H": 4 * local * width,
        "Z": item * local * width,
        "norms": item * local * config.kernel.hops,
        "student": 4 * local * max(config.student.hidden, width) * 2 + 12 * entries,
        "chunks": deeper * entries * (8 + item),
        "halo": 4 * part["halo"] * width,
    }


def _working(
    meta: dict[str, Any], config: DistillConfig, model: ModelShape, m: int, evaluation: Evaluation | None
) -> dict[str, int]:
    longest = min(meta["tokenizer"]["max_tokens"], model.positions)
    kernel = config.kernel
    item = 8 if kernel.precision == "float64" else 4
    biggest = max(part["nodes"] + part["halo"] for part in meta["parts"])
    block = min(kernel.chunk_mib << 20, biggest * m * item * LIVE_BUFFERS)
    working = {
        "encode": HEAP * model.activations(config.encoder.batch_tokens / longest, longest, kept=False)
        + 2 * 4 * biggest * model.width,
        "inject": HEAP * model.activations(min(m, config.outer.inject_batch), config.synthetic.tokens, kept=True),
        "kernel": HEAP * block + item * biggest * model.width,
    }
    if evaluation is not None and "full" in evaluation.against:
        nodes, entries = meta["num_nodes"], 2 * meta["num_edges"] + meta["num_nodes"]
        hidden = evaluation.student.hidden
        working["full"] = nodes * (4 * 3 * model.width + 4 * 8 * hidden) + 60 * entries + 4 * meta["text"]["tokens"]
        if config.encoder.adapters:
            working["full"] += model.activations(32, longest, kept=True)
    return {name: int(size) for name, size in working.items()}


def available_memory() -> int | None:
    """Bytes this process can still take: what the kernel says, or the container's limit; None if unknown."""
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free.append(int(line.split()[1]) << 10)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        anonymous = next(line for line in used.read_text().splitlines() if line.startswith("anon "))
        free.append(int(limit.read_text()) - int(anonymous.split()[1]))
    return min(free, default=None)


def gib(count: float) -> str:
    """Bytes in a unit that people read."""
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / (1 << 20):.0f} MiB" if count < 1 << 30 else f"{count / (1 << 30):.1f} GiB"
